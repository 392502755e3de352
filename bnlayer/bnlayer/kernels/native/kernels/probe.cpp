// Shows the scheme: compiled once per variant, each time into a namespace of its own.

#define BNLAYER_TEXT(name) #name
#define BNLAYER_NAME(name) BNLAYER_TEXT(name)

namespace bnlayer::BNLAYER_VARIANT {

const char* variant() { return BNLAYER_NAME(BNLAYER_VARIANT); }

}  // namespace bnlayer::BNLAYER_VARIANT
