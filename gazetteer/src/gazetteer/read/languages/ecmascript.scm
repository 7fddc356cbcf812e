; What JavaScript and TypeScript share: definitions
(class_declaration name: (_) @name (class_heritage)? @bases body: (_) @body) @class
(lexical_declaration (variable_declarator name: (identifier) @name value: (class (class_heritage)? @bases body: (_) @body))) @class
[(function_declaration name: (identifier) @name body: (_) @body)
 (generator_function_declaration name: (identifier) @name body: (_) @body)] @function
(method_definition name: [(property_identifier) (private_property_identifier) (string) (computed_property_name)] @name body: (_) @body) @method
[(lexical_declaration (variable_declarator name: (identifier) @name value: [(arrow_function body: (_) @body) (function_expression body: (_) @body) (generator_function body: (_) @body)]))
 (variable_declaration (variable_declarator name: (identifier) @name value: [(arrow_function body: (_) @body) (function_expression body: (_) @body)]))] @function
(assignment_expression left: (member_expression property: (property_identifier) @name) right: [(arrow_function body: (_) @body) (function_expression body: (_) @body)]) @function
((program [(lexical_declaration "const" (variable_declarator name: (identifier) @name
            value: [(string) (number) (template_string) (true) (false) (null) (regex) (array) (object) (new_expression) (call_expression) (unary_expression) (binary_expression) (member_expression)] @_v)) @constant
          (export_statement (lexical_declaration "const" (variable_declarator name: (identifier) @name
            value: [(string) (number) (template_string) (true) (false) (null) (regex) (array) (object) (new_expression) (call_expression) (unary_expression) (binary_expression) (member_expression)] @_v)) @constant)])
  (#not-match? @_v "^require\\("))
(export_statement [(class_declaration) (function_declaration) (lexical_declaration)] @decorated) @outer

; Documentation
(comment) @comment

; Imports
(import_statement (import_clause (named_imports (import_specifier name: (_) @import.name))) source: (string) @import.module)
(import_statement (import_clause (identifier) @import.name) source: (string) @import.module)
(import_statement (import_clause (namespace_import)) source: (string) @import.module)
(import_statement . "import" . source: (string) @import.module)
(export_statement source: (string) @import.module)
((call_expression function: [(identifier) @_f (import) @_f] arguments: (arguments . (string) @import.module .))
  (#any-of? @_f "require" "import"))

; Where code stands
[(for_statement body: (_) @in.loop) (for_in_statement body: (_) @in.loop)]
[(while_statement) (do_statement)] @in.loop
[(function_declaration "async") (arrow_function "async") (function_expression "async") (method_definition "async")] @in.async
[(function_declaration) (arrow_function) (function_expression) (method_definition) (generator_function_declaration)] @in.function

; Security
((call_expression function: (identifier) @_f) @find.eval (#eq? @_f "eval"))
((new_expression constructor: (identifier) @_f) @find.eval (#eq? @_f "Function"))
((assignment_expression left: (member_expression property: (property_identifier) @_p)) @find.inner-html
  (#any-of? @_p "innerHTML" "outerHTML"))
((call_expression function: (member_expression property: (property_identifier) @_p)) @find.inner-html
  (#any-of? @_p "insertAdjacentHTML"))
((call_expression function: [(identifier) @_f (member_expression property: (property_identifier) @_f)]) @find.exec-command
  (#any-of? @_f "execSync" "spawnSync" "execFile" "spawn"))
((pair key: (property_identifier) @_k value: (false)) @find.tls-skip (#eq? @_k "rejectUnauthorized"))

; Performance
((call_expression function: [(identifier) @_f (member_expression property: (property_identifier) @_f)]) @find.sync-io
  (#any-of? @_f "readFileSync" "writeFileSync" "existsSync" "readdirSync" "statSync" "mkdirSync"))
((call_expression function: [(identifier) @_f (member_expression property: (property_identifier) @_f)]) @find.io-in-loops
  (#any-of? @_f "fetch" "readFile" "writeFile"))

; Idioms
[(function_declaration "async") (arrow_function "async") (function_expression "async") (method_definition "async")] @find.async-def
[(generator_function_declaration) (generator_function)] @find.generator
((program . (comment)* . (expression_statement (string) @_s)) @find.strict-js (#match? @_s "use strict"))
