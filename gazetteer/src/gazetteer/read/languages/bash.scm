; Definitions
(function_definition name: (word) @name body: (_) @body) @function
(program (variable_assignment name: (variable_name) @name) @constant.variable (#match? @name "^[A-Z_][A-Z0-9_]*$"))
((declaration_command (variable_assignment name: (variable_name) @name)) @constant.variable (#match? @name "^[A-Z_][A-Z0-9_]*$"))

; Documentation
(comment) @comment

; Imports
((command name: (command_name) @_c . argument: [(word) (string) (raw_string) (concatenation)] @import.module)
  (#any-of? @_c "source" "."))

; Where code stands
[(for_statement body: (_) @in.loop) (c_style_for_statement body: (_) @in.loop)]
(while_statement) @in.loop
(function_definition) @in.function

; Security
((command name: (command_name) @_c) @find.eval (#eq? @_c "eval"))
((command name: (command_name) @_c argument: (word) @_a) @find.remove-tree
  (#eq? @_c "rm") (#match? @_a "^-[a-zA-Z]*[rR]"))
((pipeline (command name: (command_name) @_c) (command name: (command_name) @_s)) @find.curl-pipe
  (#any-of? @_c "curl" "wget") (#any-of? @_s "sh" "bash" "sudo" "python" "python3"))
((command name: (command_name) @_c argument: (word) @_a) @find.tls-skip
  (#any-of? @_c "curl" "wget") (#any-of? @_a "-k" "--insecure" "--no-check-certificate"))

; Performance
((command name: (command_name) @_c) @find.fork-in-loop
  (#any-of? @_c "cat" "grep" "sed" "awk" "cut" "basename" "dirname" "expr" "python" "python3" "curl"))

; Idioms
((command name: (command_name) @_c argument: (word) @_a) @find.strict-shell
  (#eq? @_c "set") (#match? @_a "^-[a-z]*e"))
((command name: (command_name) @_c) @find.trap (#eq? @_c "trap"))
