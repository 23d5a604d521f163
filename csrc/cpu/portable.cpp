// What headers of newer C and C++ libraries ask of theirs at run time and manylinux_2_28's lack,
// defined here instead: built on a newer system, the library loads on an older one. `make wheel`
// names what is missing when a compiler asks for more. The link hides them (exports.map).
#include <sstream>

// GLIBC_2.32: true while a process has one thread, so that std::shared_ptr may do without atomics.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GLIBCXX_3.4.26: constructors that gcc 9 added to libstdc++; torch's checks write messages in
// them.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
