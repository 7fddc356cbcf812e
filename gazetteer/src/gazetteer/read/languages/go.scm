; Definitions
(type_spec name: (type_identifier) @name type: (struct_type) @body) @class.struct
(type_spec name: (type_identifier) @name type: (interface_type) @body) @class.interface
(type_spec name: (type_identifier) @name type: [(type_identifier) (qualified_type) (pointer_type) (array_type) (slice_type) (map_type) (channel_type) (function_type) (generic_type)]) @class.type
(type_alias name: (type_identifier) @name) @class.alias
(function_declaration name: (identifier) @name body: (_)? @body) @function
(method_declaration
  receiver: (parameter_list (parameter_declaration type: [
    (type_identifier) @receiver
    (pointer_type (type_identifier) @receiver)
    (generic_type type: (type_identifier) @receiver)
    (pointer_type (generic_type type: (type_identifier) @receiver))]))
  name: (field_identifier) @name body: (_)? @body) @method
(method_elem name: (field_identifier) @name) @method
(source_file (const_declaration (const_spec name: (identifier) @name) @constant))
(source_file (var_declaration [(var_spec name: (identifier) @name) @constant.variable (var_spec_list (var_spec name: (identifier) @name) @constant.variable)]))
(type_declaration . (type_spec) @decorated .) @outer
(const_declaration . (const_spec) @decorated .) @outer

; Documentation
(comment) @comment
(package_clause (package_identifier) @package)

; Imports
(import_spec path: (interpreted_string_literal) @import.module)

; Where code stands
(for_statement body: (_) @in.loop)
[(function_declaration) (method_declaration) (func_literal)] @in.function

; Security
((call_expression function: (selector_expression operand: (identifier) @_o field: (field_identifier) @_f)) @find.exec-command
  (#eq? @_o "exec") (#any-of? @_f "Command" "CommandContext"))
((call_expression function: (selector_expression operand: (identifier) @_o field: (field_identifier) @_f)) @find.weak-hash
  (#any-of? @_o "md5" "sha1") (#any-of? @_f "New" "Sum"))
((qualified_type package: (package_identifier) @_p) @find.unsafe (#eq? @_p "unsafe"))
((selector_expression operand: (identifier) @_o) @find.unsafe (#eq? @_o "unsafe"))
((keyed_element . (literal_element (identifier) @_k) . (literal_element (true))) @find.tls-skip
  (#eq? @_k "InsecureSkipVerify"))

; Performance
(defer_statement) @find.defer-in-loop
((call_expression function: (selector_expression operand: (identifier) @_o field: (field_identifier) @_f)) @find.io-in-loops
  (#any-of? @_o "os" "ioutil" "http") (#any-of? @_f "Open" "ReadFile" "WriteFile" "Create" "Get" "Stat"))
((call_expression function: (selector_expression operand: (identifier) @_o field: (field_identifier) @_f)) @find.regex-in-loop
  (#eq? @_o "regexp") (#any-of? @_f "Compile" "MustCompile"))

; Idioms
(go_statement) @find.goroutine
(defer_statement) @find.defer
(channel_type) @find.channel
((function_declaration name: (identifier) @_n) @find.main-guard (#eq? @_n "main"))
((function_declaration name: (identifier) @_n) @find.test-case (#match? @_n "^Test[A-Z]"))
