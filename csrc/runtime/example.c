/* Predicts the classes of samples with a packed model:
 *
 *     engram_predict MODEL < samples.raw
 *
 * Samples come from standard input as uint8, one behind the other, as many as there are; `--float` takes float32.
 * Prints the label of each on a line of its own.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/engram.h"

int main(int count, char** arguments) {
  const bool floats = count == 3 && strcmp(arguments[1], "--float") == 0;
  if (count != 2 && !floats) {
    fprintf(stderr, "usage: %s [--float] MODEL < samples\n", arguments[0]);
    return 2;
  }
  engram_model* model = engram_load(arguments[count - 1], 1);
  if (model == NULL) {
    fprintf(stderr, "%s\n", engram_error());
    return 1;
  }
  int64_t features, classes;
  engram_sizes(model, &features, &classes);
  const size_t bytes = (size_t)features * (floats ? sizeof(float) : 1);
  void* sample = malloc(bytes);
  int status = sample == NULL;
  size_t read = 0;
  while (status == 0 && (read = fread(sample, 1, bytes, stdin)) == bytes) {
    int64_t class_number;
    if (engram_predict(model, sample, floats ? ENGRAM_FLOAT32 : ENGRAM_UINT8, 1, &class_number, NULL)) {
      puts(engram_label(model, class_number));
    } else {
      fprintf(stderr, "%s\n", engram_error());
      status = 1;
    }
  }
  if (status == 0 && read != 0) {
    fprintf(stderr, "samples: expected %zu bytes each, got %zu for the last\n", bytes, read);
    status = 1;
  }
  free(sample);
  engram_free(model);
  return status;
}
