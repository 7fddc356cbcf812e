; Definitions: keys of the two outer levels
(document (object (pair key: (string (string_content) @name)) @constant.key))
(document (object (pair value: (object (pair key: (string (string_content) @name)) @constant.key))))

; Documentation
(comment) @comment
