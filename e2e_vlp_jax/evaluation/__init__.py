"""Metrics, evaluators and the Python API of a trained model.

An evaluator is one file of this package with a function
`evaluate(predictor, variables, pipeline, *, max_examples, progress, ...) ->
{metric: value}`. Its other arguments are the config's
`evals.<name>.options`; `details` is a list for what it shows besides
numbers (details.py). GIVES holds patterns (`accuracy/*`) of its metrics, by
which `checkpoint.best` and `early_stop.metric` are checked before a run begins.
Optional names, for the report: HEADLINES, {metric: title}, and NO_CURVE,
metrics that appear in tables only.
"""
