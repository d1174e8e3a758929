"""What a trained model is asked for, one file a task; see base.py."""
