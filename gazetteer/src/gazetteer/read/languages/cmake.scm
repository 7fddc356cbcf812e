; Definitions
(function_def (function_command (argument_list . (argument) @name)) . (body)? @body) @function
(macro_def (macro_command (argument_list . (argument) @name)) . (body)? @body) @function.macro
((normal_command (identifier) @_c (argument_list . (argument) @name)) @constant.target
  (#match? @_c "^([aA][dD][dD]_(([lL][iI][bB][rR][aA][rR][yY])|([eE][xX][eE][cC][uU][tT][aA][bB][lL][eE])|([cC][uU][sS][tT][oO][mM]_[tT][aA][rR][gG][eE][tT]))|pybind11_add_module)$"))
((normal_command (identifier) @_c (argument_list . (argument) @name)) @constant.option
  (#match? @_c "^[oO][pP][tT][iI][oO][nN]$"))
((normal_command (identifier) @_c (argument_list . (argument) @name)) @constant.project
  (#match? @_c "^[pP][rR][oO][jJ][eE][cC][tT]$"))
((source_file (normal_command (identifier) @_c (argument_list . (argument) @name)) @constant.variable)
  (#match? @_c "^[sS][eE][tT]$"))

; Documentation
[(line_comment) (bracket_comment)] @comment

; Imports
((normal_command (identifier) @_c (argument_list . (argument) @import.module))
  (#match? @_c "^[aA][dD][dD]_[sS][uU][bB][dD][iI][rR][eE][cC][tT][oO][rR][yY]$"))
((normal_command (identifier) @_c (argument_list . (argument) @import.module.suffix))
  (#match? @_c "^[iI][nN][cC][lL][uU][dD][eE]$"))
((normal_command (identifier) @_c (argument_list . (argument) @import.module.package))
  (#match? @_c "^[fF][iI][nN][dD]_[pP][aA][cC][kK][aA][gG][eE]$"))

; Where code stands
[(function_def) (macro_def)] @in.function
[(foreach_loop) (while_loop)] @in.loop

; Security
((normal_command (identifier) @_c) @find.exec-command
  (#match? @_c "^[eE][xX][eE][cC][uU][tT][eE]_[pP][rR][oO][cC][eE][sS][sS]$"))
