import pickle

import numpy as np

from pdjax.core.logprobs import PromptLogprobs, PromptTokenLogprobs


def made(**changes: np.ndarray) -> PromptLogprobs:
    arrays = {
        "token_ids": np.array([5, 6, 7], np.int32),
        "chosen": np.array([-1.0, -0.25], np.float32),
        "ranks": np.array([3, 1], np.int32),
        "top_ids": np.array([[9, 8], [7, 9]], np.int32),
        "top": np.array([[-0.5, -0.75], [-0.25, -2.0]], np.float32),
    }
    return PromptLogprobs(**arrays | changes)


def test_entries_are_made_when_they_are_read():
    prompt = made()
    assert len(prompt) == 3
    assert prompt[0] is None
    assert prompt[1] == PromptTokenLogprobs(-1.0, ((9, -0.5), (8, -0.75)), token=6, rank=3)
    assert prompt[-1] == PromptTokenLogprobs(-0.25, ((7, -0.25), (9, -2.0)), token=7, rank=1)
    assert prompt[:2] == [None, prompt[1]]
    assert list(prompt) == [prompt[0], prompt[1], prompt[2]]


def test_they_cross_a_process_and_are_compared_by_value():
    assert pickle.loads(pickle.dumps(made())) == made()
    assert made() != made(ranks=np.array([2, 1], np.int32))
    assert made() != [None]
