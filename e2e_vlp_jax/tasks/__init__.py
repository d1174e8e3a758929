"""What a trained model can do, one file per task; see base.py."""
