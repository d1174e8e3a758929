"""Answer lists: the answers that a question classifier chooses from.

Prepared data stores answers as text; a list turns them into ids when they are
read. Lists are JSON files in `answers/`, {"source": ..., "answers": [...]}:

  scenes  every answer to a question of the drawn scenes (28).
  vqav2   the 3,129 answers of VQA v2 that LXMERT uses. Source:
          airsplay/lxmert (MIT), data/vqa/trainval_label2ans.json.
"""
import functools

from e2e_vlp_jax.data import shipped

_FOLDER = 'answers'


class AnswerList:
  """Answers and their ids.

  Attributes:
    answers: list of strings; the position is the id.
  """

  def __init__(self, answers):
    self.answers = list(answers)
    if not all(isinstance(a, str) for a in self.answers):
      raise ValueError('an answer that is no text')
    if len(self.ids) != len(self.answers):
      repeated = {a for a in self.answers if self.answers.count(a) > 1}
      raise ValueError(f'repeated answers {sorted(repeated)[:3]}')

  @functools.cached_property
  def ids(self):
    """{answer: id}."""
    return {a: i for i, a in enumerate(self.answers)}

  def __len__(self):
    return len(self.answers)

  @classmethod
  def load(cls, name):
    """Reads the shipped list `name`, or a JSON file of the same form.

    Raises:
      UserError: no such list, or a file without one.
    """
    return shipped.load(_FOLDER, name, 'data.answers', 'an answer list',
                        lambda found: cls(found['answers']))


def names():
  """Names of the shipped answer lists."""
  return shipped.names(_FOLDER)
