"""Data: official files -> records -> examples -> batches."""


def load_vocabularies(data):
  """(tokenizer, label space) that `config.data` names.

  Raises:
    UserError: unknown or unreadable.
  """
  from e2e_vlp_jax.data import label_space  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.data import tokenizer  # pylint: disable=g-import-not-at-top
  return (tokenizer.load_tokenizer(data.tokenizer.kind, data.tokenizer.path),
          label_space.LabelSpace.load(data.labels))
