"""The pool, for `cimport`."""
cpdef object empty(object shape, object dtype=*)
