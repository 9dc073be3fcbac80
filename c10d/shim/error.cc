#include "error.h"

#include <initializer_list>
#include <typeinfo>

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/exception.h>

#include "rust/cxx.h"

namespace c10d_shim {
namespace {

bool contains_any(const std::string& text, std::initializer_list<const char*> needles) {
  for (const char* needle : needles) {
    if (text.find(needle) != std::string::npos) {
      return true;
    }
  }
  return false;
}

bool is_ours(const std::string& text) {
  return text.size() >= 2 && text[1] == ' ' && std::string("TPAF").find(text[0]) != std::string::npos;
}

// Gloo's exceptions have no header here, so their type is known by its name.
char kind_of(const std::exception& error, const std::string& text) {
  if (dynamic_cast<const c10d::TimeoutError*>(&error) != nullptr ||
      // Gloo reports its limits as plain exceptions, so only their words tell.
      contains_any(text, {"Timed out", "timed out", "Wait timeout", "wait timeout", "Timeout waiting"})) {
    return 'T';
  }
  if (dynamic_cast<const c10::DistNetworkError*>(&error) != nullptr ||
      dynamic_cast<const c10::DistBackendError*>(&error) != nullptr ||
      contains_any(typeid(error).name(), {"4gloo11IoException"}) ||
      contains_any(
          text,
          {"Connection closed by peer",
           "Connection reset by peer",
           "Connection refused",
           "Broken pipe",
           "Socket closed",
           "Read error",
           "Write error"})) {
    return 'P';
  }
  return 'F';
}

std::string compose(const std::exception& error, std::string text) {
  const char kind = kind_of(error, text);
  // `find` gives the largest number if there is only one line.
  text.resize(std::min(text.size(), text.find('\n')));
  return std::string(1, kind) + ' ' + text;
}

} // namespace

std::string describe(const std::exception_ptr& error) noexcept {
  try {
    // The only way to look into an exception_ptr.
    std::rethrow_exception(error);
  } catch (const rust::Error& e) {
    // The store's own error comes back as it was sent.
    const std::string text = e.what();
    return is_ours(text) ? text : "F " + text;
  } catch (const c10::Error& e) {
    return compose(e, e.what_without_backtrace());
  } catch (const std::exception& e) {
    return compose(e, e.what());
  } catch (...) {
    return "F an exception of an unknown type";
  }
}

} // namespace c10d_shim
