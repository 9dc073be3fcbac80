// Nothing of this header is needed, see the README beside this folder.
#pragma once
