// Turns an instruction set on for the functions between SAGE_BEGIN_TARGET and SAGE_END_TARGET.
#pragma once

#define SAGE_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define SAGE_BEGIN_TARGET(features) \
  SAGE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SAGE_END_TARGET SAGE_PRAGMA(clang attribute pop)
#else
#define SAGE_BEGIN_TARGET(features) SAGE_PRAGMA(GCC push_options) SAGE_PRAGMA(GCC target(features))
#define SAGE_END_TARGET SAGE_PRAGMA(GCC pop_options)
#endif
