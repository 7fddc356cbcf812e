; Definitions
(class_definition
  name: (identifier) @name
  body: (_) @body) @class

; one base a match; keywords such as metaclass= are none
(class_definition superclasses: (argument_list [(expression) (list_splat)] @base)) @derived

(function_definition
  name: (identifier) @name
  body: (_) @body) @function

(decorated_definition
  (decorator)+ @decorator
  definition: (_) @decorated) @outer

; Documentation
(module . (comment)* . (expression_statement . (string) @overview .))
(class_definition body: (block . (comment)* . (expression_statement . (string) @doc .))) @documented
(function_definition body: (block . (comment)* . (expression_statement . (string) @doc .))) @documented
(module (comment) @comment)
(block (comment) @comment)

; Constants: names in capitals that a module or class binds, and plain module-level bindings
; that are annotated Final or are type aliases
((module (expression_statement (assignment left: (identifier) @name) @constant))
  (#match? @name "^_*[A-Z][A-Z0-9_]*$"))
((class_definition body: (block (expression_statement (assignment left: (identifier) @name) @constant)))
  (#match? @name "^_*[A-Z][A-Z0-9_]*$"))
((module (if_statement (block (expression_statement (assignment left: (identifier) @name) @constant))))
  (#match? @name "^_*[A-Z][A-Z0-9_]*$"))
((module (try_statement (block (expression_statement (assignment left: (identifier) @name) @constant))))
  (#match? @name "^_*[A-Z][A-Z0-9_]*$"))
((module (expression_statement (assignment left: (identifier) @name
  right: (call function: (identifier) @_f)) @constant.type))
  (#any-of? @_f "TypeVar" "ParamSpec" "TypeVarTuple" "NewType" "namedtuple" "NamedTuple" "TypedDict"))
((module (expression_statement (assignment left: (identifier) @name
  type: (type (identifier) @_t)) @constant.alias))
  (#eq? @_t "TypeAlias"))
(module (type_alias_statement . (type (identifier) @name)) @constant.alias)

; Imports
(import_statement name: (dotted_name) @import.module)
(import_statement name: (aliased_import name: (dotted_name) @import.module))
(import_from_statement
  module_name: (_) @import.module
  name: [(dotted_name) @import.name (aliased_import name: (dotted_name) @import.name)])
(import_from_statement module_name: (_) @import.module (wildcard_import) @import.name)
(future_import_statement "__future__" @import.module
  name: [(dotted_name) @import.name (aliased_import name: (dotted_name) @import.name)])

; Where code stands
(for_statement body: (_) @in.loop)
(while_statement) @in.loop
(function_definition "async" @_async) @in.async
(function_definition) @in.function
(lambda) @in.function
; imports that are there for type checkers alone
((if_statement condition: [(identifier) @_c (attribute attribute: (identifier) @_c)] consequence: (_) @in.typing)
  (#eq? @_c "TYPE_CHECKING"))

; Security
((call function: (identifier) @_f) @find.eval (#any-of? @_f "eval" "exec"))
((call function: (identifier) @_f) @find.compile (#any-of? @_f "compile" "__import__"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.unpickle
  (#any-of? @_o "pickle" "cPickle" "dill" "cloudpickle" "marshal" "shelve" "joblib")
  (#any-of? @_a "load" "loads" "Unpickler" "open"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.torch-load
  (#eq? @_o "torch") (#eq? @_a "load"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.yaml-load
  (#eq? @_o "yaml") (#any-of? @_a "load" "unsafe_load" "load_all" "full_load"))
((call arguments: (argument_list
    (keyword_argument name: (identifier) @_k value: (true)))) @find.shell
  (#eq? @_k "shell"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.os-system
  (#eq? @_o "os") (#any-of? @_a "system" "popen"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.mktemp
  (#eq? @_o "tempfile") (#eq? @_a "mktemp"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.weak-hash
  (#eq? @_o "hashlib") (#any-of? @_a "md5" "sha1"))
((call arguments: (argument_list
    (keyword_argument name: (identifier) @_k value: (false)))) @find.no-verify
  (#eq? @_k "verify"))
((call function: (attribute attribute: (identifier) @_a)) @find.extractall
  (#eq? @_a "extractall"))
(except_clause . ":" ) @find.bare-except
(assert_statement (tuple)) @find.assert-tuple

; Performance
((call function: [(identifier) @_f (attribute attribute: (identifier) @_f)]) @find.io-in-loops
  (#any-of? @_f "open" "read_text" "read_bytes" "write_text" "write_bytes" "readline" "readlines" "urlopen" "fsync" "stat"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.blocking-async
  (#any-of? @_o "time" "requests" "subprocess" "os" "socket" "urllib")
  (#any-of? @_a "sleep" "get" "post" "put" "request" "run" "call" "check_call" "check_output" "system" "create_connection"))
((call function: (identifier) @_f) @find.open-async (#any-of? @_f "open" "input"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.regex-in-loop
  (#eq? @_o "re") (#eq? @_a "compile"))
((call function: (attribute object: (identifier) @_o attribute: (identifier) @_a)) @find.concat-in-loop
  (#any-of? @_o "np" "numpy" "torch" "pd" "pandas") (#any-of? @_a "concatenate" "cat" "concat" "append" "hstack" "vstack"))

; Idioms
((decorator [(identifier) @_d (attribute attribute: (identifier) @_d)
             (call function: [(identifier) @_d (attribute attribute: (identifier) @_d)])]) @find.dataclass
  (#eq? @_d "dataclass"))
((decorator [(identifier) @_d (attribute attribute: (identifier) @_d)]) @find.property
  (#any-of? @_d "property" "cached_property"))
((decorator [(identifier) @_d (attribute attribute: (identifier) @_d)]) @find.abstract
  (#eq? @_d "abstractmethod"))
((decorator [(identifier) @_d (attribute attribute: (identifier) @_d)]) @find.contextmanager
  (#any-of? @_d "contextmanager" "asynccontextmanager"))
((decorator [(identifier) @_d (attribute attribute: (identifier) @_d)
             (call function: [(identifier) @_d (attribute attribute: (identifier) @_d)])]) @find.cache
  (#any-of? @_d "lru_cache" "cache" "functools.cache"))
((decorator [(identifier) @_d (attribute attribute: (identifier) @_d)]) @find.overload
  (#eq? @_d "overload"))
((function_definition name: (identifier) @_n) @find.enter-exit
  (#any-of? @_n "__enter__" "__aenter__"))
((function_definition name: (identifier) @_n) @find.iterator
  (#any-of? @_n "__iter__" "__aiter__" "__next__"))
(yield) @find.generator
(function_definition "async") @find.async-def
((class_definition superclasses: (argument_list [(identifier) @_b (attribute attribute: (identifier) @_b)
    (subscript value: (identifier) @_b)])) @find.protocol
  (#eq? @_b "Protocol"))
((class_definition superclasses: (argument_list [(identifier) @_b (attribute attribute: (identifier) @_b)])) @find.enum
  (#any-of? @_b "Enum" "IntEnum" "StrEnum" "Flag" "IntFlag"))
((class_definition superclasses: (argument_list [(identifier) @_b (attribute attribute: (identifier) @_b)])) @find.error-type
  (#match? @_b "(Exception|Error|Warning)$"))
((if_statement condition: (comparison_operator (identifier) @_n)) @find.main-guard
  (#eq? @_n "__name__"))
(match_statement) @find.match
