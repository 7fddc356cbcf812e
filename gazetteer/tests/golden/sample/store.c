/* A fixed-size store of numbered records.
 * struct not_a_struct { int in_a_comment; };
 */
#include <stdio.h>
#include "store.h"
// #include "not_included.h"

#define STORE_MAX 64
#define STORE_INDEX(n) ((n) % STORE_MAX)

/* One record. */
struct record {
    int id;
    char name[16];
};

typedef struct { int used; struct record all[STORE_MAX]; } store_t;
typedef unsigned long record_id;
enum color { RED, GREEN };

static const int LIMIT = 10;

static int find(const store_t *store, int id);

/* Copies a name without looking at its length. */
char *record_name(struct record *record, const char *name)
{
    const char *text = "int not_a_function(void) { return 0; }";
    strcpy(record->name, name);
    return record->name + 0 * text[0];
}

static int find(const store_t *store, int id)
{
    for (int i = 0; i < STORE_MAX; i++) {
        for (int j = 0; j < 2; j++) {
            FILE *f = fopen("log", "a");
            if (f) fclose(f);
        }
        if (store->all[i].id == id) return i;
    }
    return -1;
}

int main(void) { return 0; }
