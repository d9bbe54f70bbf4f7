"""What is read from a file's header, and what is said of a file that is not whole."""

import pytest

from adapter_checks.errors import InputError
from adapter_checks.safetensors_header import read_safetensors_header


def test_header_lists_names_dtypes_and_shapes(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors", {"k": "v"}
    )
    assert read_safetensors_header(tmp_path / "x.safetensors") == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


def test_a_file_cut_short_anywhere_is_noticed(tmp_path):
    import torch
    from safetensors.torch import save

    whole = save({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="x.safetensors"):
            read_safetensors_header(path)
    path.write_bytes(whole)
    assert len(read_safetensors_header(path)) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip, as torch.save writes it" * 10,
        b"version https://git-lfs.github.com/spec/v1\n",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (11).to_bytes(8, "little") + b'{"a": "no"}',
        (34).to_bytes(8, "little") + b'{"a": {"data_offsets": [0], "d":1}}',
        (4).to_bytes(8, "little") + b"\xff\xfe\x00\x01",
    ],
)
def test_files_of_another_kind_are_named(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="x.safetensors"):
        read_safetensors_header(tmp_path / "x.safetensors")


def test_bytes_after_the_last_tensor_are_noticed(tmp_path):
    import torch
    from safetensors.torch import save

    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.zeros(2)}) + b"more")
    with pytest.raises(InputError, match="bytes after its last tensor"):
        read_safetensors_header(tmp_path / "x.safetensors")
