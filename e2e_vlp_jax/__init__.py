"""End-to-end vision-language pre-training in JAX: E2E-VLP, SOHO, FIBER."""
__version__ = '0.1.0'
