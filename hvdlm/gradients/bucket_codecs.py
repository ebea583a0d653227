"""The buckets of a model and the codec of each, with the state that codecs keep from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from hvdlm.config import CompressionSection
from hvdlm.gradients.auto.plan import CodecPlan
from hvdlm.gradients.auto.switchable import SwitchableCodec
from hvdlm.gradients.bucket import Bucket, GradientBucket, make_buckets
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.dense import Dense
from hvdlm.gradients.codecs.registry import codec_factory


class OwnCodec(NamedTuple):
    """A codec that a strategy has for some parameters, which are then in buckets without others."""

    names: frozenset[str]  # of the parameters
    bucket_bytes: int  # of a bucket, about
    make: Callable[[Bucket], Codec]


class BucketCodecs:
    """`codecs[i]` sends the gradients of `buckets[i]`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        bucket_bytes: int,
        settings: CompressionSection,
        plan: CodecPlan | None,
        own: OwnCodec | None = None,
    ) -> None:
        """Takes over `.grad` of all `parameters`. `plan`: codecs that can be switched; None: `compression.codec`.

        `own`: for some parameters, of which `settings` and `plan` then say nothing.
        """
        self.plan = plan  # in use
        self._settings = settings
        self._parameters = common_parameters(parameters, own)
        self._position = {name: index for index, name in enumerate(reversed(list(parameters)))}
        self._own: list[tuple[GradientBucket, Codec]] = []
        if own:
            apart = {name: each for name, each in parameters.items() if name in own.names}
            self._own = [(bucket, own.make(bucket)) for bucket in make_buckets(apart, own.bucket_bytes)]
        self.common_buckets = make_buckets(self._parameters, bucket_bytes)  # those without `own`
        self._common_codecs: list[Codec] = []
        if plan is None:
            make_codec = codec_factory(settings.codec)
            self._common_codecs += [make_codec(bucket, settings) for bucket in self.common_buckets]
        else:
            self._make_switchable(plan)
        self._arrange()

    def switch_to(self, plan: CodecPlan) -> bool:
        """Uses the codecs of `plan` from the next step on, and returns whether that needed other buckets.

        Residuals stay with their parameters. Only between steps, and only if the constructor was given a plan.
        """
        old, self.plan = self.plan, plan
        assert old is not None
        if plan.bucket_bytes == old.bucket_bytes:
            for codec, name in zip(self._common_codecs, plan.names, strict=True):
                assert isinstance(codec, SwitchableCodec)
                codec.switch_to(name)
            return False
        kept = {name: tensor.clone() for name, tensor in self.state().items()}
        self.common_buckets = make_buckets(self._parameters, plan.bucket_bytes)
        self._make_switchable(plan)
        self._arrange()
        for name, tensor in self.state().items():
            if name in kept:
                tensor.copy_(kept[name])
        return True

    def make_dense(self) -> None:
        """Sends the gradients of all buckets as they are from the next step on."""
        self._common_codecs = [Dense(bucket, self._settings) for bucket in self.common_buckets]
        self._arrange()

    def state(self) -> dict[str, Tensor]:
        """What this rank's codecs keep from step to step, by kind and parameter: views, to be saved or filled."""
        return codec_state(self.buckets, self.codecs)

    def flat_states(self) -> list[Tensor]:
        """The tensors of `Codec.state` of all codecs: residuals."""
        return flat_states(self.codecs)

    def _make_switchable(self, plan: CodecPlan) -> None:
        pairs = zip(plan.names, self.common_buckets, strict=True)
        self._common_codecs = [SwitchableCodec(name, bucket, self._settings) for name, bucket in pairs]

    def _arrange(self) -> None:
        """Puts all buckets into the order in which a backward pass completes them."""
        pairs = [*zip(self.common_buckets, self._common_codecs, strict=True), *self._own]
        pairs.sort(key=lambda pair: max(self._position[name] for name in pair[0].names))
        self.buckets = [bucket for bucket, _ in pairs]
        self.codecs = [codec for _, codec in pairs]


def common_parameters(parameters: Mapping[str, nn.Parameter], own: OwnCodec | None) -> dict[str, nn.Parameter]:
    """Those that no codec of a strategy has for itself."""
    return {name: each for name, each in parameters.items() if own is None or name not in own.names}


def codec_state(buckets: Sequence[Bucket], codecs: Sequence[Codec]) -> dict[str, Tensor]:
    """What the codec of each bucket keeps from step to step, by kind and parameter, and its extra state: views."""
    by_parameter = {
        f"{kind}.{name}": piece
        for bucket, codec in zip(buckets, codecs, strict=True)
        for kind, flat in codec.state().items()
        for name, piece in bucket.by_name(flat).items()
    }
    extra = {name: tensor for codec in codecs for name, tensor in codec.extra_state().items()}
    return {**by_parameter, **extra}


def flat_states(codecs: Sequence[Codec]) -> list[Tensor]:
    """The tensors of `Codec.state` of all codecs: residuals."""
    return [flat for codec in codecs for flat in codec.state().values()]
