"""Copies through reused host memory have the bits of plain copies; the path of a GPU, forced on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.packing import PackedTensors, Packer, Receiver
from flowbp_ray.weights.staging import Upload
from flowbp_ray.weights.trainable import trained


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(40 + seed, generator=g)
    return {"a": whole[:16], "b": whole[16:], "apart": torch.randn(3, 5, generator=g).bfloat16()}


@pytest.mark.parametrize("staged", [True, False, None])
def test_a_stream_holds_a_bucket_until_the_next_is_requested_and_reads_none_after_that(staged: bool | None) -> None:
    """Buckets are freed when the next one is gathered, as ZeRO-3 does it; buffers grow where a bucket is larger."""
    given: list[str] = []

    def gathered() -> Iterator[dict[str, Tensor]]:
        for seed in (1, 5, 0, 9):
            bucket = {f"{name}{seed}": t for name, t in tensors(seed).items()}
            given.append(fingerprint(bucket))
            yield bucket
            for tensor in bucket.values():
                tensor.zero_()

    packer = Packer(staged)
    taken = [fingerprint({k: t.clone() for k, t in bucket.tensors().items()}) for bucket in packer.stream(gathered())]
    assert taken == given
    assert sum(buffer is not None for buffer in packer.download.buffers) == (2 if staged else 0)
    if staged:
        held = [buffer.data_ptr() for buffer in packer.download.buffers if buffer is not None]
        assert len(list(packer.stream(gathered()))) == 4
        assert held == [buffer.data_ptr() for buffer in packer.download.buffers if buffer is not None]


def test_a_stream_takes_what_cannot_be_staged_in_order() -> None:
    turned = {"t": torch.arange(6.0).view(2, 3).t()}
    buckets = [tensors(1), turned, {}, tensors(2), tensors(3)]
    found = [{k: t.clone() for k, t in b.tensors().items()} for b in Packer(True).stream(buckets)]
    assert [fingerprint(b) for b in found] == [fingerprint(b) for b in buckets]


def test_an_upload_in_pieces_is_a_copy() -> None:
    upload = Upload(chunk=7)
    for size in (0, 3, 7, 8, 50):
        source, target = torch.randint(0, 255, (size,), dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        upload.copy(target, source)
        upload.finish()
        assert torch.equal(source, target)


def test_a_receiver_installs_through_the_buffers() -> None:
    torch.manual_seed(0)
    here, there = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).bfloat16()) for _ in range(2))
    receiver = Receiver(here, staged=True)
    receiver.upload.chunk = 11
    for _ in range(2):
        receiver.install([PackedTensors.of({name: p}) for name, p in trained(there).items()])
        assert fingerprint(trained(here)) == fingerprint(trained(there))
        with torch.no_grad():
            for p in there.parameters():
                p.add_(1)
