; Definitions
(class_declaration name: (identifier) @name superclass: (_)? @bases interfaces: (_)? @bases body: (_) @body) @class
(interface_declaration name: (identifier) @name (extends_interfaces)? @bases body: (_) @body) @class.interface
(enum_declaration name: (identifier) @name body: (_) @body) @class.enum
(record_declaration name: (identifier) @name body: (_) @body) @class.record
(annotation_type_declaration name: (identifier) @name body: (_) @body) @class.annotation
(method_declaration name: (identifier) @name body: (_)? @body) @method
(constructor_declaration name: (identifier) @name body: (_) @body) @method.constructor
(compact_constructor_declaration name: (identifier) @name body: (_) @body) @method.constructor
((field_declaration (modifiers) @_m declarator: (variable_declarator name: (identifier) @name)) @constant
  (#match? @_m "static") (#match? @_m "final"))
(enum_constant name: (identifier) @name) @constant.enumerator
(constant_declaration declarator: (variable_declarator name: (identifier) @name)) @constant

; Documentation
[(line_comment) (block_comment)] @comment
(package_declaration (_) @package)

; Imports
(import_declaration (scoped_identifier) @import.module)

; Where code stands
[(for_statement body: (_) @in.loop) (enhanced_for_statement body: (_) @in.loop)]
[(while_statement) (do_statement)] @in.loop
[(method_declaration) (constructor_declaration) (lambda_expression)] @in.function

; Security
((method_invocation object: (method_invocation name: (identifier) @_o) name: (identifier) @_n) @find.exec-command
  (#eq? @_n "exec") (#eq? @_o "getRuntime"))
((object_creation_expression type: (type_identifier) @_t) @find.exec-command (#eq? @_t "ProcessBuilder"))
((object_creation_expression type: (type_identifier) @_t) @find.deserialize (#eq? @_t "ObjectInputStream"))
((method_invocation name: (identifier) @_n) @find.deserialize (#eq? @_n "readObject"))
((method_invocation object: (identifier) @_o name: (identifier) @_n arguments: (argument_list (string_literal) @_s)) @find.weak-hash
  (#eq? @_o "MessageDigest") (#eq? @_n "getInstance") (#match? @_s "MD5|SHA-?1\"$"))

; Performance
((object_creation_expression type: (type_identifier) @_t) @find.io-in-loops
  (#any-of? @_t "FileInputStream" "FileOutputStream" "FileReader" "FileWriter" "Socket" "URL"))
((method_invocation object: (identifier) @_o name: (identifier) @_n) @find.regex-in-loop
  (#eq? @_o "Pattern") (#eq? @_n "compile"))

; Idioms
((marker_annotation name: (identifier) @_n) @find.annotation (#eq? @_n "Override"))
((marker_annotation name: (identifier) @_n) @find.test-case (#eq? @_n "Test"))
(lambda_expression) @find.lambda
(synchronized_statement) @find.synchronized
((method_declaration name: (identifier) @_n) @find.main-guard (#eq? @_n "main"))
