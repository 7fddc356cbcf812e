// Shapes and their areas.
// class NotAClass {};
#include <vector>
#include "shape.hpp"

namespace geo {

constexpr double PI = 3.14;

/// Anything with an area.
class Shape {
 public:
  virtual ~Shape() = default;
  virtual double area() const = 0;
};

/// A circle.
class Circle : public Shape {
 public:
  explicit Circle(double r) : r_(r) {}
  double area() const override { return PI * r_ * r_; }
  bool operator==(const Circle& other) const;

 private:
  double r_;
};

template <typename T>
struct Box {
  T value;
  T get() const { return value; }
};

using Shapes = std::vector<Shape*>;
enum class Kind { Round, Square };

/// Adds up the areas.
double total(const Shapes& shapes) {
  double sum = 0;  // double not_a_function() { }
  for (auto* s : shapes) sum += s->area();
  auto bits = reinterpret_cast<long*>(&sum);
  return sum + 0 * (bits != nullptr);
}

}  // namespace geo

bool geo::Circle::operator==(const Circle& other) const { return r_ == other.r_; }
