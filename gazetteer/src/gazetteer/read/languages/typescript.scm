; What TypeScript has beside ecmascript.scm: definitions
(abstract_class_declaration name: (_) @name (class_heritage)? @bases body: (_) @body) @class
(interface_declaration name: (_) @name (extends_type_clause)? @bases body: (_) @body) @class.interface
(enum_declaration name: (_) @name body: (_) @body) @class.enum
(type_alias_declaration name: (_) @name) @class.alias
[(internal_module name: (_) @name) (module name: (_) @name)] @scope
(method_signature name: (_) @name) @method
(abstract_method_signature name: (_) @name) @method
(function_signature name: (_) @name) @function
(public_field_definition name: (_) @name value: [(arrow_function body: (_) @body) (function_expression body: (_) @body)]) @method
((program [(lexical_declaration "const" (variable_declarator name: (identifier) @name
            value: [(as_expression) (satisfies_expression)] @_v)) @constant
          (export_statement (lexical_declaration "const" (variable_declarator name: (identifier) @name
            value: [(as_expression) (satisfies_expression)] @_v)) @constant)])
  (#not-match? @_v "^require\\("))
(export_statement [(abstract_class_declaration) (interface_declaration) (enum_declaration) (type_alias_declaration)] @decorated) @outer
((class_declaration (decorator) @decorator) @decorated)

; Security
((predefined_type) @_t @find.any-type (#eq? @_t "any"))
