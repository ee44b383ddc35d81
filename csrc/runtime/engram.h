/* Packed models without Python or torch: loads what `ek.pack(model).save(path)` writes, predicts, and learns with the
 * counted read-outs. This header is all that a program includes; it is C, and C++ takes it too.
 *
 * A function that can fail returns a null pointer or false, and engram_error() says why. Functions that take a `const`
 * model may be called from several threads at once; the others need the model for themselves.
 */
#ifndef ENGRAM_H
#define ENGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ENGRAM_API
#else
#define ENGRAM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct engram_model engram_model;

/* Numbers of samples, (samples, features), row by row without gaps. */
typedef enum { ENGRAM_FLOAT32, ENGRAM_UINT8 } engram_type;

/* Maps a packed model into memory. `threads` share the work of a call; 1 for none beside the caller. The file must not
 * be changed while the model lives; it may be removed or replaced. */
ENGRAM_API engram_model* engram_load(const char* path, int threads);

/* The same of a file that is in memory, which is copied. */
ENGRAM_API engram_model* engram_load_memory(const void* data, size_t bytes, int threads);

ENGRAM_API void engram_free(engram_model* model);

/* Numbers of features that a sample has, and of classes. */
ENGRAM_API void engram_sizes(const engram_model* model, int64_t* features, int64_t* classes);

/* The label of a class as UTF-8, which lives as long as the model; null if there is no such class. */
ENGRAM_API const char* engram_label(const engram_model* model, int64_t class_number);

/* Class numbers of samples, (samples), and their scores, (samples, classes); either result may be null. */
ENGRAM_API bool engram_predict(const engram_model* model, const void* x, engram_type type, int64_t samples,
                               int64_t* class_numbers, float* scores);

/* Counts samples of known classes; predictions follow from all counts. False for a read-out that is not counted, or
 * was saved without what it needs to go on; nothing is learned then. */
ENGRAM_API bool engram_learn(engram_model* model, const void* x, engram_type type, int64_t samples,
                             const int64_t* class_numbers);

/* Writes the model with all that it learned. The file appears as a whole or not at all. */
ENGRAM_API bool engram_save(const engram_model* model, const char* path);

/* Why the latest call of this thread failed. It lives until the thread's next failure. */
ENGRAM_API const char* engram_error(void);

#ifdef __cplusplus
}
#endif

#endif
