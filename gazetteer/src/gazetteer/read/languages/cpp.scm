; Definitions
(class_specifier name: [(type_identifier) (template_type) (qualified_identifier)] @name (base_class_clause)? @bases body: (_) @body) @class
(struct_specifier name: [(type_identifier) (template_type) (qualified_identifier)] @name (base_class_clause)? @bases body: (_) @body) @class.struct
(union_specifier name: (type_identifier) @name body: (_) @body) @class.union
(enum_specifier name: (type_identifier) @name body: (_) @body) @class.enum
(type_definition type: (struct_specifier !name body: (_) @body) declarator: (type_identifier) @name) @class.struct
(type_definition type: (enum_specifier !name body: (_) @body) declarator: (type_identifier) @name) @class.enum
(type_definition declarator: (type_identifier) @name) @class.typedef
(alias_declaration name: (type_identifier) @name) @class.alias
(concept_definition name: (identifier) @name) @class.concept
(namespace_definition name: (_) @name body: (_)) @scope

(function_definition
  declarator: [(function_declarator declarator: [(identifier) (field_identifier) (qualified_identifier) (destructor_name) (operator_name) (operator_cast) (template_function)] @name)
               (pointer_declarator declarator: (function_declarator declarator: [(identifier) (field_identifier) (qualified_identifier) (operator_name)] @name))
               (reference_declarator (function_declarator declarator: [(identifier) (field_identifier) (qualified_identifier) (operator_name)] @name))]
  body: (_)? @body) @function
(declaration
  declarator: [(function_declarator declarator: [(identifier) (qualified_identifier)] @name)
               (pointer_declarator declarator: (function_declarator declarator: (identifier) @name))
               (reference_declarator (function_declarator declarator: (identifier) @name))]) @function.prototype
(field_declaration_list
  [(field_declaration
     declarator: [(function_declarator declarator: [(field_identifier) (operator_name)] @name)
                  (pointer_declarator declarator: (function_declarator declarator: (field_identifier) @name))
                  (reference_declarator (function_declarator declarator: [(field_identifier) (operator_name)] @name))]) @function
   (declaration declarator: (function_declarator declarator: [(identifier) (destructor_name) (operator_cast)] @name)) @function
   (template_declaration (declaration declarator: [(function_declarator declarator: [(identifier) (field_identifier)] @name)
                                                  (reference_declarator (function_declarator declarator: [(identifier) (field_identifier)] @name))])) @function])
(template_declaration [(function_definition) (class_specifier) (struct_specifier) (declaration) (alias_declaration) (concept_definition)] @decorated) @outer

(preproc_def name: (identifier) @name value: (_)) @constant.macro
(preproc_function_def name: (identifier) @name) @function.macro
(enumerator name: (identifier) @name) @constant.enumerator
([(translation_unit (declaration (type_qualifier) @_q declarator: (init_declarator declarator: (identifier) @name)) @constant)
  (declaration_list (declaration (type_qualifier) @_q declarator: (init_declarator declarator: (identifier) @name)) @constant)
  (field_declaration_list (field_declaration (type_qualifier) @_q declarator: (field_identifier) @name default_value: (_)) @constant)]
  (#any-of? @_q "const" "constexpr" "constinit"))

; Documentation
(comment) @comment

; Imports
(preproc_include path: (system_lib_string) @import.module.system)
(preproc_include path: (string_literal) @import.module)

; Where code stands
(for_statement body: (_) @in.loop)
(for_range_loop body: (_) @in.loop)
(while_statement) @in.loop
(do_statement) @in.loop
(function_definition) @in.function
(lambda_expression) @in.function

; Security
((call_expression function: [(identifier) @_f (qualified_identifier name: (identifier) @_f)]) @find.unbounded-copy
  (#any-of? @_f "strcpy" "strcat" "sprintf" "vsprintf" "gets"))
((call_expression function: [(identifier) @_f (qualified_identifier name: (identifier) @_f)]) @find.system-call
  (#any-of? @_f "system" "popen"))
((call_expression function: (identifier) @_f) @find.exec-command
  (#any-of? @_f "execl" "execlp" "execle" "execv" "execvp" "execvpe"))
((call_expression function: (template_function name: (identifier) @_f)) @find.raw-cast (#eq? @_f "reinterpret_cast"))

; Performance
((call_expression function: [(identifier) @_f (qualified_identifier name: (identifier) @_f)]) @find.io-in-loops
  (#any-of? @_f "fopen" "open" "fread" "fwrite" "read" "write" "fsync" "stat"))
(new_expression) @find.alloc-in-loop

; Idioms
((preproc_call directive: (_) @_d argument: (_) @_a) @find.include-guard
  (#match? @_d "pragma") (#match? @_a "^ *once"))
((preproc_ifdef "#ifndef" name: (identifier) @_n . (preproc_def name: (identifier) @_d)) @find.include-guard (#eq? @_n @_d))
(template_declaration) @find.template
(lambda_expression) @find.lambda
(virtual_specifier) @find.annotation
((function_definition declarator: (function_declarator declarator: (identifier) @_n)) @find.main-guard (#eq? @_n "main"))
