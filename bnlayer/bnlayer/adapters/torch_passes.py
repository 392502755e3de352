"""stub"""
from bnlayer.view import View
class DeviceView(View):
    passes = None
