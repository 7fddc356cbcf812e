#pragma once
// Declarations of shapes.
namespace geo {
double total_of(int count);
}
