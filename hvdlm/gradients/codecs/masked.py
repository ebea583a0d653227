"""Codec `masked`: secure aggregation. From what ranks send nobody learns more than the sum over all of them.

Each two ranks agree on a key (X25519), from which both draw the same random words (AES in counter mode). The one adds
them to its numbers, the other subtracts them: they cancel in the sum (Bonawitz et al., "Practical Secure Aggregation
for Privacy-Preserving Machine Learning", CCS 2017, section 4, without its recovery from users that drop out). Numbers
are multiples of 2^-24 in words of 32 bits that wrap around, so that masks cancel to the last bit, and each word that is
sent is uniformly distributed, whatever the number. That is for differences of parameters, which are of the size of
weights, and up to 64 over all ranks; what is smaller or larger stays in the residual.

It holds against ranks, and whoever reads the wire, that do as they should and remember what they see. Nobody signs the
keys: who changes messages on their way is not kept out. Of two ranks each would know the other's numbers by the sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hvdlm.comm.communicator import part_lengths
from hvdlm.config import CompressionSection
from hvdlm.errors import HvdlmError, check_installed
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec, Residual
from hvdlm.gradients.exchange import Exchange

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher

_UNIT = 2.0**-24  # the value of a word of 1
_LARGEST_SUM = 2**31 - 1
_NONCE_BYTES = 16  # its second half counts the cipher's blocks


class Masked(Codec):
    """Numbers in fixed point, under masks that cancel in the sum."""

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        check_installed("cryptography", "compression.codec = 'masked'", "cryptography", "privacy")
        self._residual = Residual(bucket, settings.error_feedback)
        self._exchange: Exchange | None = None  # whose ranks have agreed on keys
        self._keys: list[bytes] = []  # for each rank; empty for this one
        self._sums = 0  # made with these keys

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if exchange.size == 1:
            return
        if exchange is not self._exchange:
            self._keys, self._exchange, self._sums = agree_on_keys(exchange), exchange, 0
        self._residual.add_to_(gradients)
        words = self._words(gradients, exchange.size)
        self._residual.update(gradients, lambda: words * _UNIT)
        self._mask_(words, exchange.rank)
        self._sums += 1
        gradients.copy_(_sum_of_words(words, exchange))
        gradients.mul_(_UNIT)

    def _words(self, gradients: Tensor, ranks: int) -> Tensor:
        """(n,) int32: multiples of `_UNIT`, so small that the sum over all ranks does not wrap around."""
        if not bool(gradients.isfinite().all()):
            raise HvdlmError(
                f"{self.bucket.names[0]} or a parameter beside it has become infinite or NaN, which "
                "compression.codec = 'masked' cannot send: lower optimizer.lr, or resume from an earlier checkpoint"
            )
        largest = 2 ** int(math.log2(_LARGEST_SUM // ranks))  # by a power of two float32 subtracts exactly
        return (gradients.double() / _UNIT).round_().clamp_(-largest, largest).to(torch.int32)

    def _mask_(self, words: Tensor, own_rank: int) -> None:
        for rank, key in enumerate(self._keys):
            if rank != own_rank:
                mask = _random_words(key, self._sums, len(words)).to(words.device)
                words.add_(mask, alpha=1 if rank > own_rank else -1)

    def state(self) -> dict[str, Tensor]:
        return self._residual.state()


def agree_on_keys(exchange: Exchange) -> list[bytes]:
    """A key of 32 bytes with each rank, which the two of them know alone; new ones each time. Collective."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    private = X25519PrivateKey.generate()
    own = torch.frombuffer(bytearray(private.public_key().public_bytes_raw()), dtype=torch.uint8)
    public = [bytes(each.cpu().numpy()) for each in exchange.all_gather(own)]
    keys = []
    for rank, other in enumerate(public):
        secret = b"" if rank == exchange.rank else private.exchange(X25519PublicKey.from_public_bytes(other))
        both = b"".join(sorted((public[exchange.rank], other)))
        derive = HKDF(SHA256(), length=32, salt=None, info=b"hvdlm masked" + both)
        keys.append(derive.derive(secret) if secret else b"")
    return keys


def _random_words(key: bytes, number: int, count: int) -> Tensor:
    """(count,) int32, a function of the key and `number`."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    nonce = number.to_bytes(_NONCE_BYTES // 2, "big").ljust(_NONCE_BYTES, b"\0")
    cipher: Cipher[modes.CTR] = Cipher(algorithms.AES(key), modes.CTR(nonce))
    return torch.from_numpy(np.frombuffer(bytearray(cipher.encryptor().update(bytes(4 * count))), dtype="<i4"))


def _sum_of_words(words: Tensor, exchange: Exchange) -> Tensor:
    """(n,) int32, modulo 2^32: each rank adds up one part, which the others send it, and sends the sum to all."""
    lengths = part_lengths(len(words), exchange.size)
    messages = [part.contiguous().view(torch.uint8) for part in words.split(lengths)]
    received = exchange.all_to_all_v(messages, [4 * lengths[exchange.rank]] * exchange.size)
    own = torch.stack([each.view(torch.int32) for each in received]).sum(0, dtype=torch.int32)
    padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
    gathered = exchange.all_gather(padded.view(torch.uint8))
    return torch.cat([each.view(torch.int32)[:length] for each, length in zip(gathered, lengths, strict=True)])
