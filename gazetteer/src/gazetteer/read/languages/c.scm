; Definitions
(struct_specifier name: (type_identifier) @name body: (_) @body) @class.struct
(union_specifier name: (type_identifier) @name body: (_) @body) @class.union
(enum_specifier name: (type_identifier) @name body: (_) @body) @class.enum
(type_definition type: (struct_specifier !name body: (_) @body) declarator: (type_identifier) @name) @class.struct
(type_definition type: (union_specifier !name body: (_) @body) declarator: (type_identifier) @name) @class.union
(type_definition type: (enum_specifier !name body: (_) @body) declarator: (type_identifier) @name) @class.enum
(type_definition declarator: (type_identifier) @name) @class.typedef
(type_definition declarator: (function_declarator declarator: (parenthesized_declarator (pointer_declarator declarator: (type_identifier) @name)))) @class.typedef

(function_definition
  declarator: [(function_declarator declarator: (identifier) @name)
               (pointer_declarator declarator: (function_declarator declarator: (identifier) @name))
               (pointer_declarator declarator: (pointer_declarator declarator: (function_declarator declarator: (identifier) @name)))]
  body: (_) @body) @function
(declaration
  declarator: [(function_declarator declarator: (identifier) @name)
               (pointer_declarator declarator: (function_declarator declarator: (identifier) @name))]) @function.prototype

(preproc_def name: (identifier) @name value: (_)) @constant.macro
(preproc_function_def name: (identifier) @name) @function.macro
(enumerator name: (identifier) @name) @constant.enumerator
(translation_unit (declaration (type_qualifier) @_q declarator: (init_declarator declarator: (identifier) @name)) @constant
  (#eq? @_q "const"))

; Documentation
(comment) @comment

; Imports
(preproc_include path: (system_lib_string) @import.module.system)
(preproc_include path: (string_literal) @import.module)

; Where code stands
(for_statement body: (_) @in.loop)
(while_statement) @in.loop
(do_statement) @in.loop
(function_definition) @in.function

; Security
((call_expression function: (identifier) @_f) @find.unbounded-copy
  (#any-of? @_f "strcpy" "strcat" "sprintf" "vsprintf" "gets" "stpcpy"))
((call_expression function: (identifier) @_f) @find.system-call (#any-of? @_f "system" "popen"))
((call_expression function: (identifier) @_f) @find.exec-command
  (#any-of? @_f "execl" "execlp" "execle" "execv" "execvp" "execvpe"))
((call_expression function: (identifier) @_f) @find.mktemp (#any-of? @_f "mktemp" "tmpnam" "tempnam"))

; Performance
((call_expression function: (identifier) @_f) @find.io-in-loops
  (#any-of? @_f "fopen" "open" "fread" "fwrite" "read" "write" "fsync" "stat"))
((call_expression function: (identifier) @_f) @find.alloc-in-loop (#any-of? @_f "malloc" "calloc" "realloc"))

; Idioms
((translation_unit . (comment)* . (preproc_ifdef "#ifndef" name: (identifier) @_n . (preproc_def name: (identifier) @_d))) @find.include-guard
  (#eq? @_n @_d))
((preproc_call directive: (_) @_d argument: (_) @_a) @find.include-guard
  (#match? @_d "pragma") (#match? @_a "^ *once"))
((function_definition declarator: (function_declarator declarator: (identifier) @_n)) @find.main-guard (#eq? @_n "main"))
