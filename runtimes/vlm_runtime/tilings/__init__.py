"""Rules by which a picture becomes tiles, one file each, named as in `TilingSpec.rule`; `whole` where there is none.

Each offers `layout(size, spec, pictures)`, `tiles(image, spec, layout)` and `pack(rows, spec, layout, newline)`:
see `vlm_runtime.tiling`.
"""
