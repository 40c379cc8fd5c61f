"""Images as patches: a patch is the vector [P] of its pixels in the order row, column, channel; P = patch_px**2 * C.

Patches are numbered by row. The target of FCMAE and the stem of its sparse execution read the same layout.
"""

from torch import Tensor


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, L, P]; `patch_px` divides H and W."""
    batch, channels, height, width = images.shape
    grid_h, grid_w = height // patch_px, width // patch_px
    cells = images.reshape(batch, channels, grid_h, patch_px, grid_w, patch_px)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid_h * grid_w, patch_px * patch_px * channels)


def unpatchify(patches: Tensor, patch_px: int, image_size_hw: tuple[int, int]) -> Tensor:
    """Lay patches [B, L, P] back into images [B, C, H, W]: the inverse of `patchify`."""
    height, width = image_size_hw
    grid_h, grid_w = height // patch_px, width // patch_px
    cells = patches.reshape(patches.shape[0], grid_h, grid_w, patch_px, patch_px, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)
