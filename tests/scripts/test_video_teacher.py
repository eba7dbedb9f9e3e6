import pickle
import urllib.error

import pytest
import torch
from torchvision.models.video import MViT_V2_S_Weights, mvit_v2_s
from video_teacher import VideoTeacher, load_video_teacher

DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mvit_v2_s.pth"
    torch.save(mvit_v2_s().state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("block", "shape"),
    [(0, (56, 56, 96)), (2, (28, 28, 192)), (-1, (7, 7, 768))],
)
def test_shape_of_the_tokens_by_block_with_random_weights(random_weights, block, shape):
    teacher = load_video_teacher(random_weights, block=block)
    assert teacher(torch.rand(1, 3, 256, 256))[0].shape == shape


def test_tokens_are_those_of_the_first_frame_of_a_still_clip_with_random_weights(random_weights):
    image = torch.randint(0, 256, (3, 256, 300), dtype=torch.uint8)
    tokens = load_video_teacher(random_weights, block=1)(image[None])[0]

    mvit = mvit_v2_s().eval()
    mvit.load_state_dict(torch.load(random_weights, weights_only=True))
    video = torch.stack([image] * 16)  # frames first, as torchvision reads videos
    clip = MViT_V2_S_Weights.KINETICS400_V1.transforms()(video)[None]
    with torch.inference_mode():
        patches = mvit.conv_proj(clip).flatten(2).transpose(1, 2)
        column, grid = mvit.pos_encoding(patches), (8, 56, 56)
        for block in mvit.blocks[:2]:
            column, grid = block(column, grid)
    frames = column[0, 1:].reshape(8, 28, 28, 192)
    torch.testing.assert_close(tokens, frames[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(frames[0], frames[1], atol=1e-3)


def test_tokens_land_at_their_places_with_random_weights():
    teacher = VideoTeacher(mvit_v2_s())
    block = teacher.mvit.blocks[0]  # silenced: what is left is the embedding of patches
    for parameter in (*block.attn.project.parameters(), *block.mlp[-2].parameters()):
        parameter.zero_()
    image = torch.rand(1, 3, 256, 256)
    plain = teacher(image)
    for row, column in ((0, 0), (10, 40), (55, 55), (0, 55)):
        marked = image.clone()
        # 256 pixels are cut to 224; patches overlap, but the first pixel of four belongs to one.
        marked[..., 16 + 4 * row, 16 + 4 * column] += 10
        moved = (teacher(marked) - plain)[0].abs().amax(dim=-1) > 1e-4
        assert moved.nonzero().tolist() == [[row, column]]


def test_weights_from_the_download_with_random_weights(random_weights, monkeypatch):
    state = torch.load(random_weights, weights_only=True)
    url = MViT_V2_S_Weights.KINETICS400_V1.url
    monkeypatch.setattr(DOWNLOAD, lambda asked, **_: {url: state}[asked])
    image = torch.rand(1, 3, 256, 256)
    torch.testing.assert_close(
        load_video_teacher()(image), load_video_teacher(random_weights)(image)
    )


class Malicious:
    def __reduce__(self):
        return print, ("code from the file was run",)


def test_bad_weights_are_refused_in_one_line(random_weights, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(DOWNLOAD, no_network)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    state = torch.load(random_weights, weights_only=True)
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save(state | {"norm.bias": torch.zeros(5)}, tmp_path / "narrow.pth")
    torch.save(state | {"norm.bias": torch.full((768,), torch.nan)}, tmp_path / "nan.pth")
    del state["head.1.bias"]
    torch.save(state, tmp_path / "less.pth")
    for file, block, message in (
        (None, 0, "could not be downloaded.*see --random-weights.*no network"),
        (None, 16, r"block 16 must be in -16\.\.15"),
        (None, -17, r"block -17 must be in -16\.\.15"),
        ("absent.pth", 0, "absent.pth: no such"),
        ("text.pth", 0, "text.pth: not"),
        ("code.pth", 0, "code.pth: not"),
        ("list.pth", 0, "list.pth: not weights of torchvision's"),
        ("more.pth", 0, r'"more" is \(1,\), expected no such weight'),
        ("narrow.pth", 0, r'"norm.bias" is \(5,\), expected \(768,\)'),
        ("nan.pth", 0, '"norm.bias" holds numbers that are not finite'),
        ("less.pth", 0, r'"head.1.bias" is missing, expected \(400,\)'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_video_teacher(file and tmp_path / file, block=block)
        assert "\n" not in str(error.value)
    assert not capsys.readouterr().out
