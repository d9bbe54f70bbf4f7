"""Check of the deep dive on low rank: cut a matrix to rank r."""

from course_utils.exercises import TryAgain, call_learner, exercise, expect_tensor, reference


def _expect_dtype(found, given):
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (found, given)]
    if kinds[0] != kinds[1]:
        raise TryAgain("The result is in {}, and what you were given in {}. Keep the dtype.".format(*kinds))


@reference
def closest(matrix, rank):
    """The matrix of this rank that is closest to `matrix`, in the same shape (Eckart and Young 1936)."""
    import torch

    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@exercise("deep.truncate", title="Keep r directions", level="core", minutes=10)
def truncate(function):
    """Compare with the truncated singular value decomposition, `closest`; also at full rank, and where there is less than r to keep."""
    import torch

    generator = torch.Generator().manual_seed(4)
    for rows, columns, rank, holds, dtype in (
        (12, 12, 3, 12, torch.float64), (9, 14, 2, 9, torch.float64), (15, 8, 5, 8, torch.float64), (6, 10, 1, 6, torch.float64),
        (10, 7, 4, 7, torch.float32), (8, 11, 4, 2, torch.float64), (7, 5, 5, 5, torch.float64),
    ):  # fmt: skip
        matrix = torch.randn(rows, columns, dtype=dtype, generator=generator)
        if holds < min(rows, columns):
            matrix = closest(matrix, holds)
        given = matrix.clone()
        found = expect_tensor(call_learner(function, given, rank), (rows, columns), "the result")
        if not torch.equal(given, matrix):
            raise TryAgain("The matrix that you were given has changed. Make a new one.")
        _expect_dtype(found, matrix)
        if torch.allclose(found, closest(matrix, rank), atol=1e-8 if dtype is torch.float64 else 1e-5):
            continue
        raise TryAgain(_explain_truncated(found, matrix, rank))


def _explain_truncated(found, matrix, rank):
    import torch

    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found_rank = int(torch.linalg.matrix_rank(found))

    def agrees(other):
        return torch.allclose(found, other, atol=1e-5)

    if agrees(matrix):
        return "This is the whole matrix again. Keep the first r singular values only."
    if agrees(U[:, :rank] @ Vh[:rank]):
        return "The directions are right, their sizes are missing: multiply with the singular values."
    if agrees(U[:, -rank:] * S[-rank:] @ Vh[-rank:]):
        return "These are the smallest directions. The singular values come in descending order: keep the first."
    if found_rank > rank:
        return f"The result has rank {found_rank}, and {rank} was asked for."
    if len(matrix) == len(matrix.T) and agrees(U[:, :rank] * S[:rank] @ Vh.T[:rank]):
        return "The right-hand factor is turned. torch.linalg.svd returns V transposed already: take its first r rows."
    if found_rank < min(rank, int(torch.linalg.matrix_rank(matrix))):
        return f"The result has rank {found_rank} only, and {rank} was asked for."
    return (
        f"The rank is right, but there is a closer matrix of rank {rank}: yours is {(found - matrix).norm():.2f} away, the "
        f"closest {S[rank:].norm():.2f}. Use torch.linalg.svd, and take U, S and Vh from one call."
    )
