; What CUDA has beside cpp.scm: performance
((call_expression function: (identifier) @_f) @find.sync-in-loop
  (#any-of? @_f "cudaDeviceSynchronize" "cudaStreamSynchronize" "cudaMemcpy"))
((call_expression function: (identifier) @_f) @find.alloc-in-loop (#any-of? @_f "cudaMalloc" "cudaMallocManaged"))

; Idioms
((function_definition "__global__") @find.kernel)
(call_expression (kernel_call_syntax)) @find.kernel-launch
(declaration "__shared__") @find.shared-memory
