"""The final answer of texts as models write them."""

import pytest

from hf_ensemble.errors import ConfigurationError
from hf_ensemble.evaluate.extraction import EXTRACTORS, extractor


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("number_after_hashes", "48 / 2 = 24.\n#### 72", "72"),
        ("number_after_hashes", "#### $1,234.50 in all", "1234.5"),
        ("number_after_hashes", "####-7", "-7"),
        ("number_after_hashes", "#### 1\n#### 2", "1"),
        ("number_after_hashes", "The answer is 72.", None),
        ("the_answer_is", "3 + 4 = 7. The answer is 7.", "7"),
        ("the_answer_is", "the answer is 3.50. And so on", "3.5"),
        ("the_answer_is", "The final answer is: **Paris**\nNext question", "Paris"),
        ("the_answer_is", "So the answer is f a c", "f a c"),
        ("the_answer_is", "The answer is 1,000 apples.", "1,000 apples"),
        ("the_answer_is", "an answer is 7", None),
        ("choice", "The answer is (B).", "B"),
        ("choice", "Rain is (A) wet. Answer: C", "C"),
        ("choice", "(D) because", "D"),
        ("choice", "B. The second one", "B"),
        ("choice", "E", "E"),
        ("choice", "A train leaves the station", None),
        ("choice", "The answer is Berlin", None),
        ("choice", "The answer is **B**.", "B"),
        ("choice", "**Answer:** B", "B"),
        ("choice", "**Answer**: (B)", "B"),
        ("choice", "Answer: __B__", "B"),
        ("choice", 'The answer is "B"', "B"),
        ("choice", "The answer is B because (A) is wrong", "B"),
        ("choice", "Answer: I think it is (B)", "B"),
        ("choice", "Answer: I'm for **B**", "B"),
        ("choice", "Answer: I think that the answer is C", "C"),
        ("choice", "Answer: I think so", None),
        ("choice", "The answer is I.", "I"),
        ("choice", "Answer: I\nBecause the others are wrong", "I"),
        ("choice", "The answer is B-flat", None),
        ("choice", "It has to be **D.** Nothing else fits", "D"),
        ("choice", "**C) The third one**", "C"),
        ("choice", "the product 3*A*2 is even", None),
        ("yes_no", "No, although one could say yes.", "no"),
        ("yes_no", "No bird is blue, so the answer is yes.", "yes"),
        ("yes_no", "It is blue. Yes", "yes"),
        ("yes_no", "nobody knows, yesterday or today", None),
        ("last_number", "2 + 2 = 4, plus 1 makes 5.", "5"),
        ("last_number", "from 10 to -.5", "-0.5"),
        ("last_number", "none", None),
        ("last_number", "It takes 5-10 minutes", "10"),
        ("last_number", "12-4", "4"),
        ("last_number", "12 - -4", "-4"),
        ("last_number", "from 10%-20%", "20"),
        ("last_number", "x=-5", "-5"),
        ("last_number", "it is \u22125", "-5"),
        ("last_number", "x = 9.9e-3", "0.0099"),
        ("last_number", "1.5E+3", "1500"),
        ("last_number", "0e7", "0"),
        ("last_number", "about 1e9999999", "1e9999999"),
        ("last_number", "1" * 119 + "2", "1" * 119 + "2"),
        ("number_after_hashes", "#### \u22121,000/3", "-1000/3"),
        ("last_number", "3e4x and 7", "7"),
        ("number_after_hashes", "#### 1/3", "1/3"),
        ("number_after_hashes", "#### \u20ac5,000.10", "5000.1"),
        ("last_number", "a loss of -$1,234,567.50 (minus)", "-1234567.5"),
        ("last_number", "1,2,3", "3"),
        ("last_number", "in 2020,100 of them", "100"),
        ("last_number", "on 2020-01-05", "5"),
        ("number_after_hashes", "#### 1,2,3", "1"),
        ("the_answer_is", "The answer is 1,2,3.", "1,2,3"),
        ("the_answer_is", "The answer is -1,234.", "-1234"),
        ("whole_text", "  a b \n", "a b"),
        (r"<(\w+)>", "x <b> <c>", "b"),
        (r"(?:#(\d))|x", "x", None),
    ],
)
def test_final_answers(name, text, answer):
    assert extractor(name)(text) == answer


def test_every_ready_made_extractor_is_tried_above_and_functions_are_taken_as_they_are():
    assert set(EXTRACTORS) == {"number_after_hashes", "the_answer_is", "choice", "yes_no", "last_number", "whole_text"}
    assert extractor(len) is len


@pytest.mark.parametrize(
    ("extract", "message"),
    [
        ("last_nmber", "one of .*'last_number'.*found 'last_nmber' with 0 groups"),
        (r"(a)(b)", "with 2 groups"),
        ("(", r"a regular expression with one group, or a function; found '\('"),
        (3, "found a int"),
    ],
)
def test_other_extractions_are_refused(extract, message):
    with pytest.raises(ConfigurationError, match=message):
        extractor(extract)
