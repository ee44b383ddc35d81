// The kinds of layers, made from what a file says of them.
#pragma once

#include <memory>
#include <string>

#include "runtime/network.h"

namespace engram::runtime {

// `name` is the number of the layer, with which the names of its tensors begin. Raises: Error.
std::unique_ptr<Layer> make_layer(const Json& description, const std::string& name, File& file);

// The read-outs among them; null for another kind.
std::unique_ptr<Layer> make_readout(const Json& description, const std::string& name, File& file);

// A field that is a size, 1 to 2^31 - 1.
int64_t size_field(const Json& description, const char* key, const std::string& name);

}  // namespace engram::runtime
