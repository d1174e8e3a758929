"""Normalises and scores answers like the official tool of VQA v2.

An answer is compared with the answers of ten people. It scores
min(1, people who agree / 3), averaged over the ten ways to leave one person
out (Antol et al., ICCV 2015; Goyal et al., CVPR 2017). Before that, both sides
are normalised, unless all people wrote the same.

This follows github.com/GT-Vision-Lab/VQA (vqaEval.py in PythonEvaluationTools)
in every case, including its oddities.
"""
import re

_ARTICLES = ('a', 'an', 'the')
_DIGITS = {word: str(n) for n, word in enumerate(
    'zero one two three four five six seven eight nine ten'.split())}
_DIGITS['none'] = '0'
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A comma between digits, '1,000', anywhere in an answer changes how all of its
# punctuation is treated.
_NUMBER = re.compile(r'\d,\d')
_PERIOD = re.compile(r'\.(?!\d)')
# The tool passes a flag, 32, in place of the number of replacements.
_MOST_PERIODS = 32

# Contractions that the tool knows, each written as it should be.
_CONTRACTIONS = '''
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't
    haven't he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't
    might've mustn't must've needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd
    something'll that's there'd there're there's they'd they'll they're they've
    'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't
    would've wouldn't y'all you'd you'll you're you've'''.split()
# Double contractions, in which either apostrophe may be missing.
_DOUBLE = '''
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've
    who'd've wouldn't've you'd've'''.split()

# Beginnings of questions that the annotations distinguish (`question_type`; the
# list is the tool's QuestionTypes/mscoco_question_types.txt).
_OTHER_TYPE = 'none of the above'
_TYPES = frozenset(' '.join('''
    are, are the, are there, are there any, are these, are they, can you,
    could, do, do you, does the, does this, has, how, how many, how many
    people are, how many people are in, is, is he, is it, is that a, is the,
    is the man, is the person, is the woman, is there, is there a, is this,
    is this a, is this an, is this person, was, what, what animal is, what
    are, what are the, what brand, what color, what color are the, what
    color is, what color is the, what does the, what is, what is in the,
    what is on the, what is the, what is the color of the, what is the man,
    what is the name, what is the person, what is the woman, what is this,
    what kind of, what number is, what room is, what sport is, what time,
    what type of, where are the, where is the, which, who is, why, why is
    the'''.split()).split(', '))
_LONGEST_TYPE = max(len(t.split()) for t in _TYPES)


def _spellings():
  """{spelling without one apostrophe: the contraction}."""
  found = {word.replace("'", ''): word for word in _CONTRACTIONS}
  for word in _DOUBLE:
    first, second = (m.start() for m in re.finditer("'", word))
    for at in (first, second):
      found[word[:at] + word[at + 1:]] = word
  # With three apostrophes the tool knows these; somebody'd loses its own.
  return found | {
      "yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've",
      "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
      "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
      "somebody'd": 'somebodyd'}


_SPELLINGS = _spellings()


def normalise(answer):
  """Normalises an answer as the official tool does before comparing.

  Punctuation is removed where it touches a space, or where the answer has a
  number such as 1,000; elsewhere it becomes a space. Then: lower case, numbers
  up to ten as digits, no articles, apostrophes in contractions.
  """
  text = answer
  number = _NUMBER.search(answer)
  for mark in _PUNCTUATION:
    loose = f'{mark} ' in answer or f' {mark}' in answer
    text = text.replace(mark, '' if loose or number else ' ')
  text = _PERIOD.sub('', text, count=_MOST_PERIODS)
  words = (_DIGITS.get(word, word) for word in text.lower().split())
  return ' '.join(_SPELLINGS.get(word, word) for word in words
                  if word not in _ARTICLES)


def accuracy(answer, people):
  """Accuracy of one answer, in [0, 1].

  Args:
    answer: the model's answer.
    people: list of the answers of n people, ten in VQA v2. With one person (as
      in `scenes`), the accuracy is 1 if the answers are equal (our choice).

  Raises:
    ValueError: nobody answered.
  """
  if not people:
    raise ValueError('nobody answered')
  answer, *people = (re.sub('[\n\t]', ' ', a).strip()
                     for a in (answer, *people))
  if len(set(people)) > 1:
    answer, *people = map(normalise, (answer, *people))
  if len(people) == 1:
    return float(answer == people[0])
  agree = people.count(answer)
  # In `agree` of the ways, the person left out is one who agrees.
  return (agree * min(1, (agree - 1) / 3)
          + (len(people) - agree) * min(1, agree / 3)) / len(people)


def question_type(question):
  """The official `question_type`: the longest known beginning of a question.

  Test questions have no annotated type, but it follows from these words. It
  equals the annotation of all 45,172 questions that we compared.
  """
  words = question.lower().strip().rstrip('?').split()
  for count in range(min(len(words), _LONGEST_TYPE), 0, -1):
    start = ' '.join(words[:count])
    if start in _TYPES:
      return start
  return _OTHER_TYPE
