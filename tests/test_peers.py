"""TPT and ZERO on cases whose answers are known by hand."""

import math

import pytest
import torch
from clip.model import CLIP
from conftest import photograph
from torchvision.transforms.functional import to_tensor

from apm.peers import TPT, by_confidence, make_views, zero_vote


def says(*answers):
    """Logits ``(V, 3)``: for each view its class and how sure it is of it."""
    return torch.stack([sure * torch.eye(3)[answer] for answer, sure in answers])


def test_zero_is_the_vote_of_the_confident_tenth():
    doubtful = [(0, 1.0 - 0.01 * n) for n in range(27)]
    assert (
        zero_vote(says(*doubtful, (1, 9), (2, 8), (2, 7))) == 2
    )  # though 1 is surest, 0 commonest
    assert zero_vote(says(*doubtful, (1, 9), (1, 8), (2, 7))) == 1


def test_a_tie_is_broken_by_the_next_confident_view():
    rest = [(0, 1.0)] * 16
    assert zero_vote(says(*rest, (1, 9), (2, 8), (0, 5), (2, 4))) == 2  # 0 is not among the best
    assert zero_vote(says(*rest, (1, 9), (2, 8), (0, 5), (1, 4))) == 1
    assert (
        zero_vote(says(*rest, (0, 2), (0, 2), (1, 9), (2, 8))) == 1
    )  # the surest, if none breaks it
    assert zero_vote(says((2, 1), (1, 5))) == 1  # one of ten or fewer


def test_confidence_is_low_entropy():
    order = by_confidence(torch.tensor([[1.0, 1.0], [0.0, 9.0], [3.0, 0.0]]))
    assert order.tolist() == [1, 2, 0]


class Towers(torch.nn.Module):
    """A CLIP whose text embedding is the mean of its first two tokens; images are embeddings."""

    def __init__(self):
        super().__init__()
        self.token_embedding = torch.nn.Embedding(5, 2)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(2.0)))

    def encode_image(self, images):
        return images

    def encode_text(self, prompts):
        tokens = self.token_embedding(prompts)
        return tokens[:, 1:5].mean(dim=1) + tokens[:, 5]


@pytest.fixture
def towers():
    model = Towers()
    # Class 0 lies along x, class 1 along y; the context starts at zero.
    weight = torch.tensor([[7.0, 7.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [7.0, 7.0]])
    model.token_embedding.weight.data.copy_(weight)
    return model


PROMPTS = torch.tensor([[0, 1, 1, 1, 1, 2, 4], [0, 1, 1, 1, 1, 3, 4]])


def test_tpt_by_hand(towers):
    """One step of AdamW moves each number of the context by the rate, against its gradient."""
    tpt = TPT(towers, PROMPTS)
    views = torch.tensor([[1.0, 0.5], [3.0, 0.1], *([1.0, 1.0],) * 18])
    embeddings = tpt.encode_views(views)
    torch.testing.assert_close(tpt(embeddings), 2 * embeddings)  # both texts are unit vectors
    shares = (2 * embeddings[:2]).softmax(dim=1).mean(dim=0)  # the two surest of twenty
    torch.testing.assert_close(tpt.loss(embeddings), -(shares * shares.log()).sum())

    def mean_entropy(context):
        texts = torch.nn.functional.normalize(context + torch.eye(2), dim=1)
        shares = (2 * embeddings[:2] @ texts.T).softmax(dim=1).mean(dim=0)
        return -(shares * shares.log()).sum()

    context = torch.zeros(2, requires_grad=True)
    mean_entropy(context).backward()
    moved = -5e-3 * context.grad.sign()
    texts = torch.nn.functional.normalize(moved + torch.eye(2), dim=1)
    for _ in range(2):  # each image starts from the start
        logits = tpt.adapt(views)
        torch.testing.assert_close(logits, 2 * embeddings[0] @ texts.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(tpt.context.data, moved.expand(4, 2), atol=1e-6, rtol=0)
    assert mean_entropy(moved) < mean_entropy(torch.zeros(2))


def test_before_its_step_tpt_is_its_clip():
    torch.manual_seed(0)
    clip = CLIP(16, 32, 2, 64, 8, 77, 100, 64, 1, 1).eval()
    prompts = torch.zeros(3, 77, dtype=torch.long)
    prompts[:, :7] = torch.tensor([90, 1, 2, 3, 1, 5, 99])
    prompts[:, 5] = torch.tensor([5, 6, 7])
    tpt, views = TPT(clip, prompts), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = clip(views, prompts)[0]
        torch.testing.assert_close(tpt(tpt.encode_views(views)), expected)
        tpt.context.add_(1.0)
        assert not torch.allclose(tpt(tpt.encode_views(views)), expected)
        torch.testing.assert_close(clip(views, prompts)[0], expected)  # the CLIP is as it was


def test_views_are_a_function_of_seed_and_picture():
    def preprocess(image):
        return to_tensor(image.resize((16, 16)))

    image = photograph()
    state = torch.get_rng_state()
    views = make_views(image, preprocess, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert views.shape == (64, 3, 16, 16) and torch.equal(views[0], preprocess(image))
    assert len({view.numpy().tobytes() for view in views}) == 64
    assert torch.equal(views, make_views(image.copy(), preprocess, seed=1))
    assert not torch.equal(views[1:], make_views(image, preprocess, seed=2)[1:])
    assert not torch.equal(views[1:], make_views(photograph(seed=5), preprocess, seed=1)[1:])
