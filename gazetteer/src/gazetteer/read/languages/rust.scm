; Definitions
(struct_item name: (type_identifier) @name body: (_)? @body) @class.struct
(union_item name: (type_identifier) @name body: (_) @body) @class.union
(enum_item name: (type_identifier) @name body: (_) @body) @class.enum
(trait_item name: (type_identifier) @name bounds: (_)? @bases body: (_) @body) @class.trait
(source_file (type_item name: (type_identifier) @name) @class.alias)
(impl_item type: [(type_identifier) @name (generic_type type: (type_identifier) @name) (scoped_type_identifier) @name]) @scope.class
(mod_item name: (identifier) @name body: (_)) @scope
(function_item name: (identifier) @name body: (_) @body) @function
(function_signature_item name: (identifier) @name) @function
(macro_definition name: (identifier) @name . (macro_rule) @body) @function.macro
[(const_item name: (identifier) @name) (static_item name: (identifier) @name)] @constant
(enum_variant name: (identifier) @name) @constant.variant

((attribute_item)+ @decorator .
  [(struct_item) (enum_item) (union_item) (trait_item) (function_item) (const_item) (static_item) (macro_definition) (type_item) (mod_item)] @decorated)

; Documentation
[(line_comment) (block_comment)] @comment

; Imports
(use_declaration argument: [(scoped_identifier path: (_) @import.module name: (_) @import.name)
                            (use_as_clause path: (scoped_identifier path: (_) @import.module name: (_) @import.name))
                            (use_wildcard (_) @import.module)
                            (identifier) @import.module])
(use_declaration argument: (scoped_use_list path: (_) @import.module
  list: (use_list [(identifier) @import.name (self) @import.name (use_as_clause path: (identifier) @import.name)
                   (scoped_identifier) @import.name (scoped_use_list) @import.name])))
(mod_item name: (identifier) @import.module.mod !body)
(extern_crate_declaration name: (identifier) @import.module)

; Where code stands
(for_expression body: (_) @in.loop)
[(while_expression) (loop_expression)] @in.loop
((function_item (function_modifiers) @_m) @in.async (#match? @_m "async"))
[(function_item) (closure_expression)] @in.function

; Security
(unsafe_block) @find.unsafe
((function_item (function_modifiers) @_m) @find.unsafe (#match? @_m "unsafe"))
((call_expression function: (field_expression field: (field_identifier) @_f)) @find.unwrap (#any-of? @_f "unwrap" "expect"))
((call_expression function: (scoped_identifier path: (_) @_p name: (identifier) @_f)) @find.exec-command
  (#match? @_p "Command$") (#eq? @_f "new"))

; Performance
((call_expression function: (scoped_identifier path: (_) @_p name: (identifier) @_f)) @find.io-in-loops
  (#match? @_p "^(std::)?(fs|fs::File|File)$") (#any-of? @_f "open" "create" "read" "write" "read_to_string" "metadata"))
((call_expression function: (scoped_identifier path: (_) @_p name: (identifier) @_f)) @find.blocking-async
  (#match? @_p "(^|::)(thread|fs|File)$") (#any-of? @_f "sleep" "open" "read" "write" "read_to_string"))
((call_expression function: (field_expression field: (field_identifier) @_f)) @find.clone-in-loop (#eq? @_f "clone"))

; Idioms
((attribute_item (attribute (identifier) @_a)) @find.derive (#eq? @_a "derive"))
((attribute_item (attribute (identifier) @_a)) @find.test-case (#eq? @_a "test"))
(macro_definition) @find.macro-rules
(impl_item trait: (_)) @find.trait-impl
((function_item (function_modifiers) @_m) @find.async-def (#match? @_m "async"))
((source_file (function_item name: (identifier) @_n) @find.main-guard) (#eq? @_n "main"))
