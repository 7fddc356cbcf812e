; Definitions: tables, and the keys before the first of them
(table . [(bare_key) (dotted_key) (quoted_key)] @name) @constant.table
(table_array_element . [(bare_key) (dotted_key) (quoted_key)] @name) @constant.table
(document (pair . [(bare_key) (dotted_key) (quoted_key)] @name) @constant.key)
(table (pair . [(bare_key) (dotted_key) (quoted_key)] @name) @constant.key)

; Documentation
(comment) @comment
