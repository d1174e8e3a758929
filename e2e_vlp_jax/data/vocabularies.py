"""The vocabularies of a model: tokens, object labels, answers.

They determine the sizes of a model's output layers. Every checkpoint contains
them, so that it works without the original files.
"""
import dataclasses

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import answer_list
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Vocabularies:
  """Maps between a model's ids and names.

  Attributes:
    tokenizer: a `tokenizer.Tokenizer`.
    labels: a `label_space.LabelSpace`.
    answers: an `answer_list.AnswerList`; empty if no task needs it.
  """
  tokenizer: tokenizer_lib.Tokenizer
  labels: label_space.LabelSpace
  answers: answer_list.AnswerList = dataclasses.field(
      default_factory=lambda: answer_list.AnswerList(()))

  @classmethod
  def load(cls, data):
    """Loads those of `config.data`: tokenizer, labels and, if any, answers.

    If `data.vocabularies` names a checkpoint, its tokenizer replaces
    `data.tokenizer`, and its labels and answers are the defaults.

    Raises:
      UserError: unknown or unreadable.
    """
    path, answers = data.get('vocabularies'), data.get('answers')
    held = cls.from_dict(checkpoint_files.meta(path)) if path else None
    return cls(
        held.tokenizer if held else tokenizer_lib.load_tokenizer(
            data.tokenizer.kind, data.tokenizer.path),
        held.labels if held and not data.labels else
        _labels(data),
        answer_list.AnswerList.load(answers) if answers else
        held.answers if held else answer_list.AnswerList(()))

  @classmethod
  def from_dict(cls, d):
    """The inverse of `to_dict`; also of checkpoints without answers.

    Raises:
      UserError: `d` is not from `to_dict`.
    """
    try:
      return cls(tokenizer_lib.from_dict(d['tokenizer']),
                 label_space.LabelSpace.from_dict(d['labels']),
                 answer_list.AnswerList(d.get('answers', ())))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      raise errors.UserError(
          'checkpoint: its meta has no readable vocabularies '
          f'({type(e).__name__}: {e})') from e

  def to_dict(self):
    """All of it as a JSON-able dict, part of a checkpoint's `meta`."""
    return {'tokenizer': self.tokenizer.to_dict(),
            'labels': self.labels.to_dict(), 'answers': self.answers.answers}

  @property
  def sizes(self):
    """{'vocab_size', 'num_classes', 'num_attributes', 'num_answers'}."""
    return {'vocab_size': self.tokenizer.vocab_size,
            'num_classes': len(self.labels.classes),
            'num_attributes': len(self.labels.attributes),
            'num_answers': len(self.answers)}


def _labels(data):
  """The label space that `data.labels` names; see `label_space`."""
  first, _, last = data.labels.rpartition('+')
  if last != 'prepared':
    return label_space.LabelSpace.load(data.labels)
  names = dict.fromkeys(source['name'] for source in data.train)
  stored = [records.label_space(data.dir, name) for name in names]
  return label_space.union(
      ([label_space.LabelSpace.load(first)] if first else [])
      + [s for s in stored if s])
