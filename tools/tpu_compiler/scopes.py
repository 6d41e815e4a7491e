"""Makes every instruction of a Pallas TPU kernel carry its `jax.named_scope` into its bundle.

libtpu prints an operation's source file as a comment when asked to (the flag below). While this is
installed, Pallas lowers each operation with its scope in the file's place. The schedule does not
change: utilization tables are byte-identical with and without, on v4, v5e, v5p, v6e and v7x
(tests/tools). It replaces three private functions of JAX (there in 0.10.2 and 0.11.2); one that is
gone is an error here, not a silent loss of names.
"""

LIBTPU_FLAG = "--xla_mosaic_enable_llo_source_annotations=true"


def install() -> None:
    """Replaces JAX's location of Pallas operations for the rest of this process."""
    from jax._src import source_info_util
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client as jaxlib_client
    from jax._src.pallas.mosaic import lowering
    from jaxlib.mlir import ir

    for module, name in (
        (source_info_util, "current"),
        (mlir, "source_info_to_location"),
        (lowering, "LoweringContext"),
        (lowering, "_emit_pallas_lowering_rule_as_fun"),
        (lowering, "UncacheablePrimitiveError"),
    ):
        if not hasattr(module, name):
            raise RuntimeError(f"{module.__name__}.{name} is gone from this JAX: use jax 0.10.2")
    plain, current = mlir.source_info_to_location, source_info_util.current

    def current_with_own_frames():
        # Under vjp, JAX gives the operations of a backward rule the caller's frames.
        return current().replace(traceback=jaxlib_client.Traceback.get_traceback())

    def location(ctx, primitive, name_stack, traceback):
        if not isinstance(ctx, lowering.LoweringContext):
            return plain(ctx, primitive, name_stack, traceback)
        return ir.Location.file(f"[{name_stack or _function(traceback)}]", 0, 0)

    def never_shared(*args, **kwargs):
        # JAX lowers equal operations once and calls the copy: its location is the first one's.
        raise lowering.UncacheablePrimitiveError

    source_info_util.current = current_with_own_frames
    mlir.source_info_to_location = location
    lowering._emit_pallas_lowering_rule_as_fun = never_shared


def _function(traceback) -> str:
    """`@name/@name` of the functions outside JAX's core, outermost first: names the parts of
    kernels that have no scopes (splash's `body`)."""
    names = []
    for frame in traceback.frames if traceback is not None else ():
        if not any(part in frame.file_name for part in ("/jax/_src/", "/jaxlib/", __file__)):
            names.append("@" + frame.function_name.split(".")[-1])
    return "/".join(reversed(names))
