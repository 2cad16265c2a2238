// An empty Python module. The operators register themselves when the library is loaded (TORCH_LIBRARY_IMPL in each
// operator's folder), and their schemas are defined in Python (convmask/ops): nothing is bound here. The module only
// exists because setuptools builds Python modules and some platforms demand the init symbol.
#include <Python.h>

extern "C" {

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
  };
  return PyModule_Create(&definition);
}
}
