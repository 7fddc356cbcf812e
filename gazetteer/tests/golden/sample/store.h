#ifndef STORE_H
#define STORE_H
struct record;
int main(void);
#endif
