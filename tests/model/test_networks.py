"""The networks, decoders and digits of the benchmarks: known sizes, sane scale, same by seed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.workloads import decoder, digits, networks

pytestmark = pytest.mark.usefixtures("one_thread")
MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": networks.resnet18,
    "resnet50": networks.resnet50,
    "mobilenet_v2": networks.mobilenet_v2,
}
# What torchvision has: parameters, entries of the state_dict, and some of their names and shapes.
KNOWN: dict[str, tuple[int, int, dict[str, list[int]]]] = {
    "resnet18": (
        11_689_512,
        122,
        {
            "conv1.weight": [64, 3, 7, 7],
            "bn1.running_var": [64],
            "layer1.0.conv1.weight": [64, 64, 3, 3],
            "layer4.0.downsample.0.weight": [512, 256, 1, 1],
            "layer4.1.bn2.bias": [512],
            "fc.weight": [1000, 512],
        },
    ),
    "resnet50": (
        25_557_032,
        320,
        {
            "layer1.0.downsample.1.weight": [256],
            "layer2.0.conv2.weight": [128, 128, 3, 3],
            "layer4.2.conv3.weight": [2048, 512, 1, 1],
            "fc.bias": [1000],
        },
    ),
    "mobilenet_v2": (
        3_504_872,
        314,
        {
            "features.0.0.weight": [32, 3, 3, 3],
            "features.1.conv.0.0.weight": [32, 1, 3, 3],
            "features.1.conv.1.weight": [16, 32, 1, 1],
            "features.2.conv.1.0.weight": [96, 1, 3, 3],
            "features.17.conv.3.running_mean": [320],
            "features.18.0.weight": [1280, 320, 1, 1],
            "classifier.1.weight": [1000, 1280],
        },
    ),
}


@pytest.fixture(scope="module", params=MAKERS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Each network once."""
    return request.param, MAKERS[request.param](0)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_sizes_are_the_known_ones(network: tuple[str, nn.Module]) -> None:
    name, model = network
    parameters, entries, some = KNOWN[name]
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == entries
    assert {key: list(state[key].shape) for key in some} == some


@torch.no_grad()
def test_activations_keep_a_sane_scale(network: tuple[str, nn.Module]) -> None:
    """After every convolution and BatchNorm, for images that the statistics are not from."""
    _, model = network
    spread: dict[str, float] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> None:
            spread[name] = float(y.std())

        return hook

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    logits = model(next(networks.synthetic_images(4, 4)))
    for hook in hooks:
        hook.remove()
    assert not model.training
    assert logits.shape == (4, 1000)
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    assert (logits[0] - logits[1]).abs().mean() > 0.05, "no function of the image"
    assert len(spread) == len(layers)
    assert all(0.1 < value < 10 for value in spread.values()), spread


def test_forward_is_residual() -> None:
    """A block whose last BatchNorm is 0 passes its input on."""
    x = torch.rand(2, 64, 5, 5)
    block = networks.resnet18().layer1[0]
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    assert torch.equal(block(x), x)
    block = networks.mobilenet_v2().features[3]
    nn.init.zeros_(block.conv[3].weight)
    nn.init.zeros_(block.conv[3].bias)
    x = torch.randn(2, 24, 5, 5)
    assert torch.equal(block(x), x)


def test_seed_decides_the_network() -> None:
    before = torch.get_rng_state()
    first, again, other = networks.resnet18(3), networks.resnet18(3), networks.resnet18(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert not torch.equal(first.bn1.running_mean, other.bn1.running_mean)


def test_running_statistics_are_used_as_trained_ones() -> None:
    norms = [m for m in networks.resnet18().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.momentum == 0.1 and not norm.training for norm in norms)
    assert all(bool((norm.running_var > 0).all()) for norm in norms)
    assert all(bool((norm.running_mean != 0).any()) for norm in norms)


@pytest.mark.parametrize("size", [1, 50, 224])
def test_synthetic_images_do_not_depend_on_batches(size: int) -> None:
    whole = torch.cat(list(networks.synthetic_images(7, 7, size, seed=2)))
    batches = list(networks.synthetic_images(7, 3, size, seed=2))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), whole)
    assert whole.shape == (7, 3, size, size) and whole.dtype == torch.float32
    assert torch.equal(next(networks.synthetic_images(2, 2, size, seed=2)), whole[:2])
    assert not torch.equal(next(networks.synthetic_images(7, 7, size, seed=3)), whole)
    assert not torch.equal(whole[0], whole[1])


def test_synthetic_images_are_smooth_and_normalised() -> None:
    x = torch.cat(list(networks.synthetic_images(64, 16, 96)))
    assert abs(float(x.mean())) < 0.2
    assert 0.8 < float(x.std()) < 1.2
    step = (x[..., 1:] - x[..., :-1]).std() / x.std()
    assert 0.02 < float(step) < 0.4  # white noise: 1.41
    grey = x.mean(1, keepdim=True)
    assert 0.2 < float((x - grey).std()) < 0.8 * float(grey.std())


@pytest.mark.parametrize("name", ["count", "batch_size", "size"])
def test_synthetic_images_refuse_numbers_below_1(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        networks.synthetic_images(**{"count": 2, "batch_size": 2, name: 0})


@torch.no_grad()
def test_decoder_does_not_see_its_padding() -> None:
    pytest.importorskip("transformers")
    model = decoder.preset("tiny")
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    (batch,) = decoder.token_batches(4, 4, 12, 256, seed=0, padded=True)
    logits = model(**batch).logits
    assert logits.shape == (4, 12, 256)
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    for row, tokens in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = model(input_ids=batch["input_ids"][row : row + 1, :tokens]).logits[0]
        torch.testing.assert_close(logits[row, :tokens], alone, rtol=1e-4, atol=1e-4)


def test_decoder_has_the_shape_asked_for_and_follows_its_seed() -> None:
    pytest.importorskip("transformers")
    shape = {"layers": 1, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2}
    first, again, other = (
        decoder.llama_shaped(**shape, vocabulary=20, seed=seed) for seed in (1, 1, 2)
    )
    layers = {n: list(m.weight.shape) for n, m in first.named_modules() if type(m) is nn.Linear}
    block = "model.layers.0."
    assert layers == {
        f"{block}self_attn.q_proj": [32, 32],
        f"{block}self_attn.k_proj": [16, 32],
        f"{block}self_attn.v_proj": [16, 32],
        f"{block}self_attn.o_proj": [32, 32],
        f"{block}mlp.gate_proj": [48, 32],
        f"{block}mlp.up_proj": [48, 32],
        f"{block}mlp.down_proj": [32, 48],
        "lm_head": [20, 32],
    }
    assert same(first, again)
    assert not same(first, other)


def test_wrong_decoders_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"^heads must divide hidden.*got hidden=30, heads=4"):
        decoder.llama_shaped(1, 30, 8, 4, 2, 20)
    with pytest.raises(ValueError, match=r"kv_heads must divide heads, got .*kv_heads=3"):
        decoder.llama_shaped(1, 32, 8, 4, 3, 20)
    with pytest.raises(ValueError, match=r"^name must be one of tiny, 1b-ish, 8b, got 'large'"):
        decoder.preset("large")


def test_decoder_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers: pip install "adaround_ext\[demo\]"'):
        decoder.preset("tiny")


@pytest.mark.parametrize("padded", [False, True])
def test_token_batches(padded: bool) -> None:
    (whole,) = decoder.token_batches(50, 50, 16, 100, seed=1, padded=padded)
    batches = list(decoder.token_batches(50, 8, 16, 100, seed=1, padded=padded))
    assert [len(batch["input_ids"]) for batch in batches] == [8] * 6 + [2]
    for key, value in whole.items():
        assert value.dtype == torch.int64
        assert torch.equal(torch.cat([batch[key] for batch in batches]), value)
    ids, mask = whole["input_ids"], whole["attention_mask"].bool()
    assert int(ids[mask].min()) >= 1 and int(ids.max()) < 100
    assert bool((ids[~mask] == 0).all())
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all()), "not on the right"
    lengths = mask.sum(1)
    if padded:
        assert int(lengths.min()) < 5 and int(lengths.max()) > 12
    else:
        assert bool(mask.all())


def test_wrong_token_batches_are_refused() -> None:
    for name, number in (("count", 0), ("batch_size", 0), ("length", 0), ("vocabulary", 1)):
        numbers = {"count": 2, "batch_size": 2, "length": 2, "vocabulary": 2, name: number}
        with pytest.raises(ValueError, match=f"^{name} must be at least {number + 1}, got"):
            decoder.token_batches(**numbers)


@pytest.mark.parametrize(("kind", "ratio"), [("residual", 0.6), ("separable", 0.85)])
def test_digits_networks_learn(kind: digits.Kind, ratio: float) -> None:
    pytest.importorskip("sklearn")
    data = digits.load()
    model: nn.Module = digits.ResidualNet() if kind == "residual" else digits.SeparableNet()
    losses = digits.train(model, data.training_images, data.training_labels, epochs=2, shift=1)
    assert len(losses) == 2
    assert losses[1] < ratio * losses[0]
    logits = model.eval()(data.test_images)
    assert logits.shape == (497, 10)
    assert torch.isfinite(logits).all()


def test_trained_follows_its_seed() -> None:
    pytest.importorskip("sklearn")
    before = torch.get_rng_state()
    first, again, other = (digits.trained("separable", seed, epochs=1) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training
    assert same(first, again)
    assert not same(first, other)
    with pytest.raises(ValueError, match=r"^kind must be 'residual' or 'separable', got 'dense'"):
        digits.trained("dense")  # type: ignore[arg-type]


def test_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    data, other = digits.load(), digits.load(1)
    assert data.training_images.shape == (1300, 1, 8, 8)
    assert data.test_images.shape == (497, 1, 8, 8)
    assert float(data.training_images.min()) == 0 and float(data.training_images.max()) == 1
    assert len(torch.unique(torch.cat([data.training_images, data.test_images]), dim=0)) == 1797
    assert not torch.equal(data.test_images, other.test_images)


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'scikit-learn: pip install "adaround_ext\[demo\]"'):
        digits.load()


def test_shift_moves_whole_images() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 3] = 1
    x = image.expand(400, -1, -1, -1)
    moved = digits._shifted(x, 1, torch.Generator().manual_seed(0))
    places = moved.flatten(1).argmax(1)
    assert moved.shape == x.shape and bool((moved.sum((1, 2, 3)) == 1).all())
    assert {(int(p) // 8 - 4, int(p) % 8 - 3) for p in places} == {
        (down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)
    }


def test_accuracy_is_a_share() -> None:
    scores = torch.eye(3)[[0, 1, 2, 2]]
    assert digits.accuracy(nn.Identity(), scores, torch.tensor([0, 1, 2, 0])) == 0.75
