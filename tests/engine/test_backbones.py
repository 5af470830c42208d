from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import nn

from pfc.data.errors import UsageError
from pfc.engine.backbones import backbone_names, build_backbone, register

IRESNET_BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 14, 3], 100: [3, 13, 30, 3], 200: [6, 26, 60, 6]}
IRESNET_PARAMETERS = {18: 24_025_600, 34: 34_139_328, 50: 43_590_848, 100: 65_156_160, 200: 118_833_920}
CPU_SIZED = ["iresnet18", "mobilefacenet", "small"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def iresnet_parameters(blocks, embedding_dim, height, width):
    """Counted by hand: a 3×3 convolution without bias 9·c·c', a norm 2·c, a PReLU c."""
    count = 9 * 3 * 64 + 2 * 64 + 64
    channels = 64
    for out, depth in zip([64, 128, 256, 512], blocks, strict=True):
        count += channels * out + 2 * out  # the first block's 1×1 shortcut and its norm
        for _ in range(depth):
            count += 2 * channels + 9 * channels * out + 2 * out + out + 9 * out * out + 2 * out
            channels = out
    count += 2 * 512
    return count + 512 * -(-height // 16) * -(-width // 16) * embedding_dim + embedding_dim + 2 * embedding_dim


@pytest.mark.parametrize("number", IRESNET_BLOCKS)
def test_iresnet_has_the_known_number_of_parameters(number):
    with torch.device("meta"):
        model = build_backbone(f"iresnet{number}", embedding_dim=512, image_size=(112, 112))
        narrow = build_backbone(f"iresnet{number}", embedding_dim=64, image_size=(50, 33))
    assert parameters(model) == IRESNET_PARAMETERS[number]
    assert parameters(model) == iresnet_parameters(IRESNET_BLOCKS[number], 512, 112, 112)
    assert parameters(narrow) == iresnet_parameters(IRESNET_BLOCKS[number], 64, 50, 33)


@pytest.mark.parametrize("number", [18, 50])
def test_iresnet_state_dict_has_the_common_names(number):
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", "prelu.weight", "fc.weight", "fc.bias"]
    names += [f"{module}.{leaf}" for module in ("bn1", "bn2", "features") for leaf in norm]
    for layer, depth in enumerate(IRESNET_BLOCKS[number], start=1):
        for block in range(depth):
            prefix = f"layer{layer}.{block}."
            names += [prefix + name for name in ("conv1.weight", "conv2.weight", "prelu.weight")]
            names += [f"{prefix}{module}.{leaf}" for module in ("bn1", "bn2", "bn3") for leaf in norm]
        names += [f"layer{layer}.0.downsample.0.weight"] + [f"layer{layer}.0.downsample.1.{leaf}" for leaf in norm]
    with torch.device("meta"):
        model = build_backbone(f"iresnet{number}", embedding_dim=512, image_size=(112, 112))
    assert sorted(model.state_dict()) == sorted(names)


def test_iresnet_final_norm_keeps_its_weight_at_one():
    model = build_backbone("iresnet18", embedding_dim=16, image_size=(32, 32))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.features.weight, torch.ones(16))
    assert not torch.equal(model.features.bias, torch.zeros(16))


def test_iresnet_block_computes_the_papers_formula():
    """BN → 3×3 → BN → PReLU → 3×3 stride 2 → BN, plus BN of the 1×1 stride 2."""
    model = build_backbone("iresnet18", embedding_dim=16, image_size=(32, 32)).eval()
    block, f, x = model.layer2[0], nn.functional, torch.randn(2, 64, 16, 16)

    def norm(module, x):
        return f.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=1e-5)

    y = norm(block.bn2, f.conv2d(norm(block.bn1, x), block.conv1.weight, padding=1))
    y = f.conv2d(f.prelu(y, block.prelu.weight), block.conv2.weight, stride=2, padding=1)
    shortcut = norm(block.downsample[1], f.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), norm(block.bn3, y) + shortcut)


def test_mobilefacenet_has_the_papers_number_of_parameters():
    def bottleneck(channels, out, expansion):
        hidden = expansion * channels
        return channels * hidden + 9 * hidden + hidden * out + 6 * hidden + 2 * out  # two norms + PReLUs, one norm

    count = 27 * 64 + 3 * 64 + 9 * 64 + 3 * 64  # 3×3, depthwise 3×3; a norm and a PReLU after each
    channels = 64
    for expansion, out, repeats in [(2, 64, 5), (4, 128, 1), (2, 128, 6), (4, 128, 1), (2, 128, 2)]:
        for _ in range(repeats):
            count += bottleneck(channels, out, expansion)
            channels = out
    count += 128 * 512 + 3 * 512 + 7 * 7 * 512 + 2 * 512 + 512 * 128 + 2 * 128
    model = build_backbone("mobilefacenet", embedding_dim=128, image_size=(112, 112))
    assert parameters(model) == count == 1_003_136
    wide = build_backbone("mobilefacenet", embedding_dim=512, image_size=(112, 112))
    assert parameters(wide) == count + 384 * 514


@pytest.mark.parametrize("name", CPU_SIZED)
@pytest.mark.parametrize("image_size", [(32, 32), (33, 50), (16, 47)])
def test_any_image_size_gives_embeddings_of_the_asked_length(name, image_size):
    model = build_backbone(name, embedding_dim=24, image_size=image_size)
    images = torch.rand(3, 3, *image_size) * 2 - 1
    embeddings = model(images)
    assert embeddings.shape == (3, 24)
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CPU_SIZED)
def test_embeddings_are_float32_under_autocast_and_the_same_in_channels_last(name):
    model = build_backbone(name, embedding_dim=24, image_size=(32, 32)).eval()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    plain = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(plain, half).min() > 0.99
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_small_without_batch_norm_treats_each_image_by_itself(norm):
    model = build_backbone("small", embedding_dim=24, image_size=(32, 32), norm=norm, width=16)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)
    assert not list(model.buffers())


def test_small_stays_small():
    assert parameters(build_backbone("small", embedding_dim=128, image_size=(48, 48))) < 1_000_000
    narrow = build_backbone("small", embedding_dim=128, image_size=(48, 48), width=16)
    assert parameters(narrow) < 200_000


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_small_learns_a_toy_task(norm):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(8, 3, 16, 16, generator=generator)
    model = build_backbone("small", embedding_dim=16, image_size=(16, 16), width=8, norm=norm)
    classifier = nn.Linear(16, 8)
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=3e-3)
    for _ in range(60):
        labels = torch.randint(8, (32,), generator=generator)
        images = (prototypes[labels] + torch.randn(32, 3, 16, 16, generator=generator)) / 2
        loss = nn.functional.cross_entropy(classifier(model(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # log 8 = 2.08 at the start
    assert all(parameter.grad.any() for parameter in model.parameters())  # no block is dead from the start


@pytest.mark.parametrize("name", CPU_SIZED)
def test_too_small_an_image_is_refused(name):
    with pytest.raises(UsageError, match=r"7×40 pixels are too small .* needs (8×8|16×16)"):
        build_backbone(name, embedding_dim=8, image_size=(7, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 3}, r"backbone\.options\.widht: .*its options are: width, norm"),
        ({"width": 12}, r"backbone\.options\.width: found 12; .*multiple of 8"),
        ({"width": "wide"}, r"backbone\.options\.width: found 'wide'; .*integer"),
        ({"norm": "layer"}, r"backbone\.options\.norm: found 'layer'; .*'batch', 'group' or 'none'"),
        ({"embedding_dim": 0}, r"backbone\.embedding_dim: found 0"),
        ({"name": "smal"}, r"backbone\.name: no backbone 'smal'; did you mean 'small'\? Known: iresnet18, "),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(**{"name": "small", "embedding_dim": 8, "image_size": (32, 32), **options})
    assert "\n" not in str(caught.value)


def test_a_registered_backbone_is_built_by_name(monkeypatch):
    monkeypatch.setattr("pfc.engine.backbones.registry._factories", {})

    @register("linear")
    def linear(embedding_dim: int, image_size: tuple[int, int], bias: Annotated[bool, Field()] = True) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], embedding_dim, bias=bias))

    assert backbone_names() == ["linear"]
    model = build_backbone("linear", embedding_dim=5, image_size=(4, 6), bias=False)
    assert model(torch.zeros(2, 3, 4, 6)).shape == (2, 5)
    with pytest.raises(ValueError, match="two backbones"):
        register("linear")(linear)
