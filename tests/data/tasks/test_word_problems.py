import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_lightning.data.tasks.family import SPLITS
from egspo_lightning.data.tasks.word_problems import WordProblemTask
from egspo_lightning.errors import UserError
from egspo_lightning.types import Problem

TASKS = st.builds(
    WordProblemTask, num_events=st.integers(1, 5), max_number=st.integers(4, 30), max_value=st.integers(30, 200)
)
STORY = "Mia has 12 shells, finds 7 more, loses 5, then soon has 3 times as many. How many shells does Mia have now?"


def test_story_by_hand():
    task = WordProblemTask()
    problem = Problem("1", STORY, task.answer(STORY))
    assert problem.answer == "42"
    assert task.key(STORY) == "12+7-5*3"
    assert task.solve(problem).solution == r"12+7=19. 19-5=14. 14*3=42. \boxed{42}"
    single = "Tom has 9 pens, sells 4. How many pens does Tom have now?"
    assert WordProblemTask(1).key(single) == "9-4"


def test_words_do_not_decide_the_split():
    task = WordProblemTask()
    other = STORY.replace("Mia", "Omar").replace("shells", "eggs").replace("finds 7 more", "gets 7 more")
    assert task.key(other) == task.key(STORY)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("12 shells", "21 shells"),  # above max_number
        ("finds 7 more", "finds 1 more"),  # below 2
        ("3 times", "6 times"),  # factors are 2 to 5
        ("loses 5", "loses 19"),  # no shells left
        ("finds 7 more", "finds 07 more"),
        ("finds 7 more", "eats 7 more"),
        (", then", ","),
        ("does Mia", "does Tom"),
        ("Mia", "Zoe"),
        ("shells", "doubts"),
        (", loses 5", ""),  # two events
        ("now?", "now"),
    ],
)
def test_other_texts_are_outside_of_the_family(old, new):
    assert old in STORY
    assert WordProblemTask().key(STORY.replace(old, new)) is None


@given(task=TASKS, split=st.sampled_from(sorted(SPLITS)), seed=st.integers(0, 9), index=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_each_step_computes_one_event(task, split, seed, index):
    problem = task.problem(seed, split, index)
    *steps, box = task.solve(problem).solution.split(". ")
    assert len(steps) == task.num_events
    count = int(re.findall(r"[0-9]+", problem.problem)[0])
    for step in steps:
        left, right = step.split("=")
        assert left.startswith(str(count))
        count = eval(left)  # by Python, independently of the package
        assert int(right) == count
        assert 1 <= count <= task.max_value
    assert box == f"\\boxed{{{count}}}"
    assert problem.answer == str(count)


@pytest.mark.parametrize("arguments", [{"num_events": 0}, {"num_events": 9}, {"max_number": 1}, {"max_value": 19}])
def test_word_problem_ranges(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        WordProblemTask(**arguments)
