"""Our kernels under the measuring tools: a case in, the function, its arguments and its region
counts out. The only file of the tools that knows the kernel package."""

from tpu_compiler.cases import Built, Case


def build(case: Case) -> Built:
    """The project's kernel for the case.

    Raises:
      NotImplementedError: the kernel does not exist for the case, in one line.
    """
    if case.kernel not in BUILDERS:
        raise NotImplementedError(f"no TPU kernel for {case.kernel} yet")
    return BUILDERS[case.kernel](case)


BUILDERS = {}
