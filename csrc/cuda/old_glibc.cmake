# old_glibc(<target>): link <target> so that it loads on glibc 2.28, whatever this machine has.
#
# glibc 2.34 moved threads and dlopen into libc and gave the names a new version, which the CUDA
# runtime, linked in, would then ask for. It still has the old versions, and so has every glibc
# before. Empty libraries of the old names, never shipped, have the linker ask for those.
# `make wheel` (auditwheel) names what is missing when a newer runtime calls more.
set(libpthread.so.0
    create detach join kill once getspecific setspecific key_create key_delete
    condattr_setpshared mutex_trylock mutexattr_destroy mutexattr_init mutexattr_setpshared
    mutexattr_settype rwlock_destroy rwlock_init rwlock_rdlock rwlock_timedrdlock
    rwlock_timedwrlock rwlock_tryrdlock rwlock_trywrlock rwlock_unlock rwlock_wrlock
    rwlockattr_destroy rwlockattr_init rwlockattr_setpshared spin_destroy spin_init spin_lock
    spin_trylock spin_unlock)
list(TRANSFORM libpthread.so.0 PREPEND pthread_)
list(APPEND libpthread.so.0 sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
set(libdl.so.2 dlclose dlerror dlopen dlsym dlvsym)
set(librt.so.1 shm_open shm_unlink)

function(old_glibc target)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    return()
  endif()
  foreach(name libpthread.so.0 libdl.so.2 librt.so.1)
    set(base "${CMAKE_CURRENT_BINARY_DIR}/old_glibc/${name}")
    set(source "")
    set(map "GLIBC_2.2.5 { global:")
    foreach(function IN LISTS ${name})
      string(APPEND source "void ${function}(void) {}\n")
      string(APPEND map " ${function};")
    endforeach()
    string(APPEND map " local: *; };\n")
    if(name STREQUAL "libdl.so.2")
      string(APPEND source "void dlmopen(void) {}\n")
      string(APPEND map "GLIBC_2.3.4 { global: dlmopen; } GLIBC_2.2.5;\n")
    endif()
    file(CONFIGURE OUTPUT "${base}.c" CONTENT "${source}" @ONLY)
    file(CONFIGURE OUTPUT "${base}.map" CONTENT "${map}" @ONLY)
    add_custom_command(
      OUTPUT "${base}"
      COMMAND ${CMAKE_CXX_COMPILER} -x c -shared -fPIC -fno-builtin -nostdlib "${base}.c" -o "${base}"
              -Wl,-soname,${name} -Wl,--version-script=${base}.map
      DEPENDS "${base}.c" "${base}.map" VERBATIM)
    list(APPEND stubs "${base}")
  endforeach()
  add_custom_target(old_glibc DEPENDS ${stubs})
  add_dependencies(${target} old_glibc)
  # Before the runtime and libc: whoever has a name first counts.
  target_link_options(${target} PRIVATE "LINKER:--push-state,--no-as-needed" ${stubs}
                      "LINKER:--pop-state")
  set_target_properties(${target} PROPERTIES LINK_DEPENDS "${stubs}")
endfunction()
