"""What conversion knows of a family: the record that each file of `convert.families` fills."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from convert.layout import Signature


class Original(NamedTuple):
    """A component inside an original release: its config is read off the shapes.

    Attributes:
        config: (key -> shape) -> our config. rules: our config -> RULES of the keys below the prefix.
        prefix: of its keys when written back.
        implied: (config, keys) -> tensors that such files leave out.
        release: `_class_name` of the config.json that releases have beside the weights; where it is there, `config`
            takes its content as `release=`.
        marks: our config -> tensors that say something by being there, which are written empty.
    """

    upstream_class: str
    config: Any
    rules: Any
    prefix: str
    implied: Any = None
    release: str | None = None
    marks: Any = None


class Processor(NamedTuple):
    """Where a diffusers folder has the settings of the image processor: a folder, the class that it is written back as,
    and the tokenizer that this class keeps beside them."""

    folder: str
    upstream_class: str
    tokenizer: str | None = None


CLIP_PROCESSOR = Processor("image_processor", "CLIPImageProcessor")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family as checkpoints show it.

    Attributes:
        pipelines: upstream's pipeline classes; the first is written back.
        components: our component names and the class each is written back as.
        tokenizers: names of the tokenizer folders and the class each is written back as.
        scheduler: the scheduler config of releases that carry none (single files).
        originals: our component names -> how original releases have them.
        signatures: how components are told by their keys; those of one component from the special to the general.
        settings: fields of model_index.json that say how the pipeline is run.
        guess: our configs -> those settings, for releases that carry none.
        pipeline: our configs -> the pipeline class to be written back, where it is not the first.
        complete: our configs -> those of them that the others say more of, where they were read off shapes.
        ignored: prefixes of keys in single files that belong to no component.
        beside: component -> names of the files that hold it beside a release's main file.
        tokenizers_beside: tokenizer -> folders of original releases that hold it under another name.
        processor: of pictures, where a pipeline has one.
        folders: folders of original releases whose transformer is not the first one -> the component that it is.
    """

    pipelines: tuple[str, ...]
    components: Mapping[str, str]
    tokenizers: Mapping[str, str]
    scheduler: Mapping[str, Any]
    originals: Mapping[str, Original]
    signatures: Sequence[Signature]
    settings: tuple[str, ...] = ()
    guess: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    pipeline: Callable[[Mapping[str, Any]], str] | None = None
    complete: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()
    beside: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tokenizers_beside: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    processor: Processor = CLIP_PROCESSOR
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
