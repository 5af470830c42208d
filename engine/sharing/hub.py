"""A trained network in the layout of the Hugging Face Hub: config.json, model.safetensors, README.md."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from ...data.errors import UsageError
from .. import own_code
from ..backbones import build_backbone
from .preparing import prepare

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
    from huggingface_hub.constants import CONFIG_NAME, HF_HUB_CACHE, SAFETENSORS_SINGLE_FILE
except ImportError:
    raise ImportError("pfc.engine.sharing.hub needs huggingface_hub: pip install 'pfc[hub]'") from None

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .preparing import Picture

CARD = "README.md"


class EmbeddingNetwork(nn.Module, PyTorchModelHubMixin, library_name="pfc", pipeline_tag="image-feature-extraction"):
    """images [b, 3, H, W] float32, as ``preprocess`` gives them → embeddings [b, D] float32, each of length 1.

    ``EmbeddingNetwork.from_pretrained(FOLDER_OR_REPOSITORY)`` gives the network in eval mode, ``push_to_hub`` uploads
    it. No code that comes with weights is run, and no pickle is read: a backbone ``MODULE:FUNCTION`` must be on the
    Python path, and apart from the folder.

    Args:
        backbone: ``name``, ``embedding_dim`` and ``options``, as in a run's configuration.
        preprocessing: as ``preparing.preprocessing`` gives it.
        flip: whether the mirror image's embedding is added, as in the run's evaluation; False halves the time.

    Attributes:
        backbone: the network itself, whose embeddings are not normalised and of the image alone.
        card: the text of its model card, None where there is none.

    Raises:
        UsageError: the backbone cannot be built.
    """

    def __init__(self, backbone: dict[str, Any], preprocessing: dict[str, Any], flip: bool = False) -> None:
        super().__init__()
        size = preprocessing["size"]
        self.backbone = build_backbone(
            backbone["name"],
            embedding_dim=backbone["embedding_dim"],
            image_size=(size["height"], size["width"]),
            apart_from=Path(HF_HUB_CACHE),
            **backbone.get("options", {}),
        )
        self.preprocessing, self.flip = preprocessing, flip
        self.card: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.backbone(images)
        if self.flip:
            embeddings = embeddings + self.backbone(images.flip(3))
        return normalize(embeddings)

    def preprocess(self, images: "Picture | Sequence[Picture]") -> Tensor:
        """Images of Pillow, or uint8 arrays [h, w, 3] (RGB) or [h, w], one or several → float32 [b, 3, H, W]."""
        return prepare(images, self.preprocessing)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that it came with."""
        return super().generate_model_card(*args, **kwargs) if self.card is None else ModelCard(self.card)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The backbone's weights under its own names, so that ``init.path`` takes the file too."""
        from safetensors.torch import save_file

        weights = {name: value.clone().contiguous() for name, value in self.backbone.state_dict().items()}
        save_file(weights, str(save_directory / SAFETENSORS_SINGLE_FILE), metadata={"format": "pt"})
        (save_directory / SAFETENSORS_SINGLE_FILE).chmod(0o644)  # safetensors makes it its owner's alone

    @classmethod
    def _from_pretrained(cls, *, model_id: str, cache_dir: Any, strict: bool = True, **rest: Any) -> Any:
        folder = Path(model_id) if Path(model_id).is_dir() else None
        told = [set(rest[key]) if isinstance(rest.get(key), dict) else set() for key in ("backbone", "preprocessing")]
        if not (told[0] >= {"name", "embedding_dim"} and told[1] >= {"size", "rescale_factor", "mean", "std"}):
            raise UsageError(f"{model_id}: no {CONFIG_NAME} of pfc there: give a folder that pfc export has written")
        if ":" in (name := rest["backbone"]["name"]):
            for place in {Path(HF_HUB_CACHE), Path(cache_dir or HF_HUB_CACHE), folder or Path(HF_HUB_CACHE)}:
                own_code.check_apart("backbone.name", name.partition(":")[0], place)
            own_code.load("backbone.name", name, apart_from=folder or Path(cache_dir or HF_HUB_CACHE))
        if folder is not None and not (folder / SAFETENSORS_SINGLE_FILE).is_file():
            raise UsageError(f"{folder}: {SAFETENSORS_SINGLE_FILE} is missing: copy the whole folder")
        network = super()._from_pretrained(model_id=model_id, cache_dir=cache_dir, strict=True, **rest)
        if folder is not None and (folder / CARD).is_file():
            network.card = (folder / CARD).read_text(encoding="utf-8")
        return network

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        from safetensors import SafetensorError

        try:
            super()._load_as_safetensor(model.backbone, model_file, map_location, strict)
        except (RuntimeError, SafetensorError) as error:  # other weights, or a damaged file
            reason = " ".join(str(error).split())
            raise UsageError(f"{model_file} does not hold this network: {reason[:300]}") from None
        return model.to(map_location).eval()

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise UsageError(f"{model_file} is a pickle, which pfc does not read: give {SAFETENSORS_SINGLE_FILE}")
